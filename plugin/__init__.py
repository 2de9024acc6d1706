"""Home of the Axolotl plugin: its configuration schema and its hooks, and nothing that belongs to the observer.

In an Axolotl YAML: ``plugins: [swanlab_ray.plugin.SwanLabRayPlugin]``.
"""

from swanlab_ray.plugin.hooks import SwanLabRayPlugin

__all__ = ["SwanLabRayPlugin"]
