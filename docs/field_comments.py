"""A griffe extension: comments behind fields become their documentation.

The project's dataclasses document a field by a comment on its line. Griffe,
which reads docstrings for mkdocs.yml, ignores comments.
"""

import tokenize

from griffe import Docstring, Extension


class FieldComments(Extension):
  """Lists `field: type  # comment` in the docstring of the field's class."""

  def __init__(self):
    self._comments = {}  # by path: comments by line

  def on_class_members(self, *, cls, **_):
    if cls.docstring is None or 'Args:' in cls.docstring.value:
      return
    if not any('dataclass' in str(d.value) for d in cls.decorators):
      return
    rows = [
      f'    {name}: {comment}'
      for name, field in cls.attributes.items()
      if not name.startswith('_') and (comment := self._comment(field))
    ]
    if rows:
      cls.docstring = Docstring(
        '\n'.join([cls.docstring.value, '', 'Args:', *rows]),
        lineno=cls.docstring.lineno,
        endlineno=cls.docstring.endlineno,
        parent=cls,
        parser=cls.docstring.parser,
        parser_options=cls.docstring.parser_options,
      )

  def _comment(self, field):
    if field.annotation is None or field.endlineno is None:
      return None
    path = field.filepath
    if path not in self._comments:
      with tokenize.open(path) as file:
        self._comments[path] = {
          token.start[0]: token.string.lstrip('# ')
          for token in tokenize.generate_tokens(file.readline)
          if token.type == tokenize.COMMENT
        }
    return self._comments[path].get(field.endlineno)
