"""The grammars of responses, a module each; :mod:`vrlt_fast.data.grammars.named` has them by name."""
