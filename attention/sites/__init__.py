"""The sites of a Haiku model: places that `capture` reads and `edit` changes.

Values leave and enter a model as Haiku state, the only thing that passes
through `hk.layer_stack`, `hk.remat` and Haiku's loops, and that carries module
paths. `discover` runs the model's `init` abstractly with one state leaf per
site. The leaves of the selected sites are then part of the state that `apply`
is given, where a `Visitor` reads and writes them.
"""

from attention.sites.discovery import check_any, choose, discover, find
from attention.sites.running import leaves_of, run, stateful
from attention.sites.visitors import (
  KINDS,
  Selection,
  Site,
  Visit,
  Visitor,
  read,
)

__all__ = [
  'KINDS',
  'Selection',
  'Site',
  'Visit',
  'Visitor',
  'check_any',
  'choose',
  'discover',
  'find',
  'leaves_of',
  'read',
  'run',
  'stateful',
]
