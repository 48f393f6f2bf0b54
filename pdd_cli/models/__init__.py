"""Networks: loading any super-resolution model, and the networks that training and metrics use.

Image files and training belong elsewhere.
"""
