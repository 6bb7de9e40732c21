"""What FreqKV knows of transformers and its models: names, families, and how a model is looked at."""
