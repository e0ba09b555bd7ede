"""The one place that knows everything: what each command does, as functions of Python."""
