"""Which process of which job this is, on which machine, and what it is doing."""
