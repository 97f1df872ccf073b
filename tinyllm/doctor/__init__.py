"""What this machine uses, what a crash has left behind, and the command that repairs it."""
