"""What people bring: Parquet, JSON lines, tables and templates become prompts. Knows no tokens."""
