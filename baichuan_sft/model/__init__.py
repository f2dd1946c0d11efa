"""The portable island: configuration, model, head, chat and tokenizer of the Baichuan family.

These files import torch, transformers, sentencepiece and each other, nothing of this package: they are
copied beside every saved model, where ``trust_remote_code=True`` runs them without the package.
"""

# First, so that the registration which follows it meets no half-imported file of this folder.
import transformers  # noqa: F401
