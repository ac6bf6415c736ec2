"""How good a model is, as numbers with intervals. Needs no framework: models are callables or embeddings.

``metrics`` and ``agreement`` are functions of arrays; ``zero_shot``, ``retrieval`` and ``corruptions`` are
what is measured; ``picture_sets`` and ``offered`` are what it is measured on; ``subjects``, ``passes`` and
``comparison`` run several models past the same pictures, and ``results`` and ``tables`` hold what was found.
"""
