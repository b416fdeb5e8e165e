"""Functions of a model's own that turn queries and keys by the angles of tables, known by trying them out."""
