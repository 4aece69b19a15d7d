"""Small data sets to try things on, from packages: Fashion-MNIST, MNIST, emoji drawn with a font, WordNet's nouns.

The command line takes them as ``examples.data:fashion_mnist`` and so on, in a clone of the repository.
"""

from .images import emoji, fashion_mnist, mnist_5k
from .texts import wordnet

__all__ = ["emoji", "fashion_mnist", "mnist_5k", "wordnet"]
