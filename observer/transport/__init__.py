"""From the training thread to the writer."""
