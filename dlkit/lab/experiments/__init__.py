"""The experiments, one file each. dlkit/lab/experiment.py describes the form of a file."""
