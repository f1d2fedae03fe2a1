"""What a run will need and take, said before it starts: memory by part, time, money, and settings with reasons."""
