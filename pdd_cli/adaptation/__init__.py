"""`pdd adapt`: training by Pairwise Distance Distillation, judging, and registering the result.

The loop, its losses and state, and the run folder belong here; networks and images do not.
"""
