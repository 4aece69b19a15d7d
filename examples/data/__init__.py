"""Small data sets to try things on, from packages.

Images: Fashion-MNIST, MNIST, emoji drawn with a font. Texts: WordNet's nouns, fortunes, tweets.

The command line takes them as ``examples.data:fashion_mnist`` and so on, in a clone of the repository.
"""

from .images import emoji, fashion_mnist, mnist_5k
from .texts import fortunes, hypernyms, tweets, wordnet

__all__ = ["emoji", "fashion_mnist", "fortunes", "hypernyms", "mnist_5k", "tweets", "wordnet"]
