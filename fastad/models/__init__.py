"""The methods. Importing this package registers them all."""

from fastad.models import grad as grad
from fastad.models import intra as intra
from fastad.models import reverse_distillation as reverse_distillation
from fastad.models import uniad as uniad
from fastad.models.registry import Method, build, method_class, methods, rebuild

__all__ = ["Method", "build", "method_class", "methods", "rebuild"]
