"""What both sides speak: messages, names, texts, and what must not be said."""
