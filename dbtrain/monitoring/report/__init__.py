"""A run as one self-contained HTML page: gathered as plain data, drawn as SVG, and put into a template."""
