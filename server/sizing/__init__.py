"""What a base with many adapters takes on a device, and with which settings it is served there: arithmetic only."""
