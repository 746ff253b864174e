"""Text or messages to token ids, and back; nothing else in coppice knows text."""
