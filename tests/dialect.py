"One way to write code: lines of at most 120 characters, spaces after commas, single quotes for names"
import ast, io, json, re, sys, tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMPARISONS = '==', '!=', '<=', '>=', '<', '>', ':=', '->'

def is_name(literal):
    "A string literal for programs: no white space, nothing to escape; texts for people may stand in double quotes"
    return re.fullmatch(r'[rbfu]*"[^\s"\'\\{}]+"', literal, re.I) is not None

def repairs(code):
    "(line, start, end, better) of what is written otherwise"
    tokens, brackets = list(tokenize.generate_tokens(io.StringIO(code).readline)), []
    for i, t in enumerate(tokens):
        (row, col), (_, end), after = t.start, t.end, tokens[i+1] if i+1 < len(tokens) else t
        if t.type == tokenize.OP and t.string in '([{': brackets.append(t.string)
        if t.type == tokenize.OP and t.string in ')]}' and brackets: brackets.pop()
        touches = after.start == t.end and after.type not in (tokenize.NEWLINE, tokenize.NL, tokenize.COMMENT)
        # x[:,0] is one look into an array, and stays together
        needs_space = touches and after.string not in ')]}' and brackets[-1:] != ['[']
        if t.type == tokenize.OP and t.string == ',' and needs_space: yield row, col, end, ', '
        if t.type == tokenize.OP and t.string in COMPARISONS[:6]:
            if tokens[i-1].end == t.start or touches: yield row, *around(t, tokens[i-1], after)
        if t.type == tokenize.STRING and is_name(t.string) and not is_docstring(tokens, i):
            yield row, col, end, t.string.replace('"', "'")

def around(t, before, after):
    "A comparison with one space on both sides, as far as the line goes"
    left = t.start[1] if before.end == t.start else before.end[1] if before.end[0] == t.start[0] else t.start[1]
    right = after.start[1] if after.start[0] == t.end[0] else t.end[1]
    before_it = ' ' if before.end[0] == t.start[0] else ''
    behind_it = ' ' if after.start[0] == t.end[0] else ''
    return left, right, before_it+t.string+behind_it

def is_docstring(tokens, i):
    "A string that is a statement of its own"
    begins = tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.COMMENT, tokenize.ENCODING
    return tokens[i-1].type in begins or tokens[i-1].string == ':'

def repaired(code):
    "The same program, better written"
    lines = code.split('\n')
    for row, start, end, better in sorted(repairs(code), reverse=True):
        lines[row-1] = lines[row-1][:start]+better+lines[row-1][end:]
    out = '\n'.join(lines)
    assert ast.dump(ast.parse(out)) == ast.dump(ast.parse(code)), code
    return out

def complaints(code):
    "What is written otherwise in a piece of code, a line each; code with magics is not Python, and passed over"
    if re.search(r'^\s*[%!]', code, re.M): return []
    lines = code.split('\n')
    long = [f'{i}: {len(l)} characters' for i, l in enumerate(lines, 1) if len(l) > 120]
    return long + [f'{row}: {lines[row-1].strip()[:80]} → {better!r}' for row, _, _, better in repairs(code)]

def pieces():
    "(name, code) of every cell and script"
    for p in sorted((ROOT/'nbs').rglob('*.ipynb')):
        if '.ipynb_checkpoints' in p.parts: continue
        for i, c in enumerate(json.loads(p.read_text())['cells']):
            if c['cell_type'] == 'code': yield f'{p.relative_to(ROOT)}, cell {i}', ''.join(c['source'])
    for p in sorted([*(ROOT/'tests').glob('*.py'), ROOT/'setup.py']): yield str(p.relative_to(ROOT)), p.read_text()

def repair_all():
    "Repairs notebooks and scripts where it can; long lines are for people"
    for p in sorted((ROOT/'nbs').rglob('*.ipynb')):
        nb = json.loads(p.read_text())
        for c in nb['cells']:
            code = ''.join(c['source'])
            if c['cell_type'] == 'code' and complaints(code): c['source'] = repaired(code).splitlines(keepends=True)
        p.write_text(json.dumps(nb, ensure_ascii=False, indent=1)+'\n')
    for p in sorted([*(ROOT/'tests').glob('*.py'), ROOT/'setup.py']): p.write_text(repaired(p.read_text()))

if __name__ == '__main__':
    if sys.argv[1:] == ['--repair']: repair_all()
    found = [f'{name}, line {c}' for name, code in pieces() for c in complaints(code)]
    print('\n'.join(found[:40]), f'{len(found)} in all', sep='\n')
    sys.exit(bool(found))
