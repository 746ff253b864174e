"""KV states kept across runs: a store on disk that knows token ids, never text."""
