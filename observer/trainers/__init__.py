"""What trainers of Transformers and TRL have in their hands."""
