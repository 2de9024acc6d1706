"""``swanlab-ray doctor``: what is wrong with a machine, told before a training finds out."""
