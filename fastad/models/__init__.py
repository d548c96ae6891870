"""The methods. Importing this package registers them all."""

from fastad.models import grad as grad
from fastad.models.registry import Method, build, method_class, methods, rebuild

__all__ = ["Method", "build", "method_class", "methods", "rebuild"]
