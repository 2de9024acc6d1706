"""SwanLab as it is: its private names in one file, its HTTP API, what it does not take."""
