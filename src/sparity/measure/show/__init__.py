"""Reports as text, tables, pages and model cards."""
