"""JoLA and Curvature Tuning in the trainers that people use, one short file each; `tiny.py` stands in for model and data."""
