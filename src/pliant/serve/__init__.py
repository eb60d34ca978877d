"""Serving a running model over HTTP, inside one memory budget.

`engine` says what HTTP asks of an engine; `sequential` is one. Only `http`, `streams`, `gate`,
`metrics` and `server` need the extra "serve".
"""
