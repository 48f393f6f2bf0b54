"""`pdd adapt`: training by Pairwise Distance Distillation, evaluation and registration of the result.

The training loop, its losses and state, and the run folder belong here. Networks are in `models`, crops in `data`.
"""
