"""Text: documents, tokenizers, and how both become windows of tokens."""
