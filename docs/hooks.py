"""Hooks of the documentation's build, listed in mkdocs.yml.

They add the notebooks, which lie outside docs/, to the site and to its
navigation, and keep their pages free of scripts from other hosts.
"""

import html
import json
import pathlib
import re

import latex2mathml.converter
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

_ROOT = pathlib.Path(__file__).parent.parent
_NOTEBOOKS = 'notebooks/*.ipynb'
# nbconvert loads MathJax and Mermaid from other hosts.
_SCRIPTS = re.compile(
  r'<script(?=[^>]*>)(?:(?!</script>).)*?'
  r'(?:mathjax|mermaid)(?:(?!</script>).)*</script>',
  re.DOTALL | re.IGNORECASE,
)
_MATH = re.compile(
  r'\$\$(.+?)\$\$|(?<![\w$\\])\$([^\s$][^$\n]*?)\$(?![\w$])', re.DOTALL
)
_MARKDOWN = re.compile(
  r'(<div class="[^"]*jp-MarkdownOutput[^"]*"[^>]*>)(.*?)(</div>)', re.DOTALL
)
_CODE = re.compile(r'(<(pre|code)\b.*?</\2>)', re.DOTALL)


def on_config(config):
  """Replaces the pattern of the notebooks in the navigation by their titles."""
  config.nav = _expand(config.nav)
  return config


def _expand(item):
  if isinstance(item, list):
    return [_expand(x) for x in item]
  if isinstance(item, dict):
    return {title: _expand(x) for title, x in item.items()}
  if item != _NOTEBOOKS:
    return item
  return [{_title(path): f'notebooks/{path.name}'} for path in _notebooks()]


def _notebooks():
  """Paths of the notebooks, in the order of their numbers."""
  return sorted(
    _ROOT.glob(_NOTEBOOKS), key=lambda path: int(path.name.partition('_')[0])
  )


def _title(path):
  """The first heading of a notebook, or else its file name."""
  for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
    for line in ''.join(cell['source']).splitlines():
      if cell['cell_type'] == 'markdown' and line.startswith('# '):
        return line.removeprefix('# ').strip()
  return path.stem


@event_priority(100)  # before mkdocs-jupyter, which takes over notebooks
def on_files(files, config):
  """Adds the notebooks to the files of the site."""
  for path in _notebooks():
    files.append(
      File(
        f'notebooks/{path.name}',
        str(_ROOT),
        config.site_dir,
        config.use_directory_urls,
      )
    )
  return files


def on_page_content(content, page, **_):
  """Removes foreign scripts from a notebook; typesets its formulas."""
  if not page.file.src_uri.endswith('.ipynb'):
    return content
  return _MARKDOWN.sub(
    lambda m: m[1] + _typeset(m[2]) + m[3], _SCRIPTS.sub('', content)
  )


def _typeset(text):
  """LaTeX between dollars as MathML, which browsers draw by themselves."""
  parts = _CODE.split(text)  # text, code, its tag, text, …
  return ''.join(
    _MATH.sub(_formula, part) if i % 3 == 0 else part
    for i, part in enumerate(parts)
    if i % 3 != 2
  )


def _formula(match):
  return latex2mathml.converter.convert(
    html.unescape(match[1] or match[2]).strip(),
    display='block' if match[1] else 'inline',
  )
