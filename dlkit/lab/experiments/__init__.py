"""The experiments, a file each. What such a file holds is said in dlkit/lab/experiment.py."""
