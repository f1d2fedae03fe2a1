"""Splits data into training, validation and test rows so that none of the last two stands in the first."""
