"README.md from nbs/index.ipynb (Quarto, which nbdev would use, is a program that pip cannot install)"
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent

def render():
    "The notebook as Markdown: hidden cells left out, links to pictures of the repository kept"
    nb = nbformat.read(ROOT/'nbs'/'index.ipynb', as_version=4)
    nb.cells = [c for c in nb.cells if not re.match(r'#\|\s*hide\s*$', c.source, re.M)]
    for i, c in enumerate(nb.cells):    # of some cells only the tables are shown
        if re.match(r'#\|\s*hide_input', c.source):
            tables = [o['data']['text/markdown'] for o in c.outputs if 'text/markdown' in o.get('data', {})]
            nb.cells[i] = nbformat.v4.new_markdown_cell('\n\n'.join(tables))
    for c in nb.cells: c.source = re.sub(r'^#\|.*\n', '', c.source, flags=re.M)
    body, _ = MarkdownExporter().from_notebook_node(nb)
    body = body.replace('](../', '](').replace('src="../', 'src="')
    return '<!-- made from nbs/index.ipynb by `make readme`: edit that -->\n' + body.strip() + '\n'

if __name__ == '__main__':
    (ROOT/'README.md').write_text(render())
