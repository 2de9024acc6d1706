"""Home of the Axolotl plugin: its configuration schema and its hooks, and nothing that belongs to the observer."""
