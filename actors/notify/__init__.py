"""What a team's chat is told, and when."""
