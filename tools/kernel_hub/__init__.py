"""The library as a kernel for Hugging Face's Kernel Hub: ``make kernel-hub`` writes the repository that is uploaded.

``build`` writes it: the modules come from the package as they are, and ``kernel/`` holds what only the Hub needs.
"""
