"""How good a model is, as numbers with intervals. numpy only: models are callables or embeddings here."""
