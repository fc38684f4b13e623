"""Chat templates made at random: what they cost, where they fail, and what they try to reach."""

from collections.abc import Callable
from pathlib import Path
from random import Random

from fuzzing.archives import PYTHON, SHELL
from fuzzing.mutant import FREE, Expect, Mutator

NAME = "chat_template.jinja"
SIZES = [0, 1, -1, 3, 99, 5000, 99_999, 100_000, 2_000_000, 10_000_000, 2**31, 2**63, 10**30]
ATOMS = "messages messages[0] messages[0].content messages[-1]['role'] loop.index loop bos_token none true".split()
ATOMS += "x y eos_token self cycler joiner namespace lipsum caller varargs undefined_name '' 'abc' 'a\\n'".split()
ATOMS += "1.5 [] {} [1,2] {'a':1}".split()
ATOMS += [
    "'中' * 3",
    "messages|length",
    "range(3)",
    "{'a': {'b': 1}}",
    "lipsum()",
    "dict(a=1)",
    "1e308 * 10",
    "0/0",
    "()",
]
# Filters with arguments of which one may be a size.
FILTERS = """indent(N) center(N) truncate(N) wordwrap(N) wordwrap(0) batch(N) slice(N) round(N) tojson(indent=N) pprint
truncate(1) replace('a','b'*N) replace('','ab'*N) join('x'*N) list sort unique reverse upper title trim string float int
abs sum min max first last random length wordcount xmlattr urlize striptags escape forceescape safe format(N) items
dictsort groupby('role') map('upper') map(attribute='content') select('odd') selectattr('role','eq','user') reject
default('x'*N) filesizeformat attr('__class__') attr('format') tojson center(N)|center(N)""".split()
TESTS = "defined undefined none string number mapping iterable odd even divisibleby(N) in(messages) sameas(x)".split()
PARAMETERS = ["a,a", "a=1,b", "*a", "self", "caller"]
BLOCK_FILTERS = ["upper", "indent(9999999)", "center(99999999)", "nothing"]
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    f"{{{{ cycler.__init__.__globals__.os.system('{SHELL}') }}}}",
    f'{{{{ self.__init__.__globals__.__builtins__.exec("{PYTHON}") }}}}',
    f"{{{{ lipsum.__globals__['os'].popen('{SHELL}').read() }}}}",
    "{{ '{0.__class__.__base__}'.format(messages) }}{{ '%s' % ([].append,) }}",
    "{{ ('{0.__init__.__globals__[os]}')|format(cycler) }}{{ messages.append(1) }}",
    "{{ namespace.__init__.__globals__ }}{{ raise_exception.__globals__ }}{{ strftime_now.__globals__ }}",
    "{% include '/etc/passwd' %}{% import 'os' as os %}{% extends '../outside' %}",
    f"{{% for c in [].__class__.__base__.__subclasses__() %}}{{{{ c('{SHELL}') }}}}{{% endfor %}}",
    "{{ (messages|map(attribute='__class__')|list)[0]('x') }}{{ messages.__class__.__name__ }}",
    "{{ strftime_now('%' * 100000) }}{{ strftime_now('%999999999d') }}{{ strftime_now('\\ud800') }}",
    "{{ raise_exception('no\\n' * 1000) }}",
    "{{ '%99999999999d' % 1 }}{{ '{:>9999999999}'.format(1) }}{{ '%.999999999f' % 1.5 }}",
    "{{ 9 ** 9 ** 9 }}{{ 2 ** 10000000 }}{{ (10 ** 5000)|string }}",
    "{{ 'a'.__mul__(10000000000) }}{{ 'ab'.join(['x'] * 100000000) }}{{ 'a'.zfill(10000000000) }}",
    "{{ 'a'.ljust(5000000000) }}{{ 'a'.expandtabs(9999999999) }}{{ ('\\t' * 9).expandtabs(999999999) }}",
    "{{ 'a'.replace('', 'x' * 50000000) }}{{ 'a'.translate({97: 'x' * 100000000}) }}{{ messages.copy.__self__ }}",
]


def expression(random: Random, depth: int = 0) -> str:
    kind = random.randrange(9 if depth < 4 else 2)

    def inner() -> str:
        return expression(random, depth + 1)

    def sized(text: str) -> str:
        return text.replace("N", str(random.choice(SIZES)))

    if kind == 0:
        return str(random.choice(SIZES))
    if kind == 1:
        return random.choice(ATOMS)
    if kind in (2, 3):
        return f"({inner()})|{sized(random.choice(FILTERS))}"
    if kind == 4:
        return f"({inner()} {random.choice('+ - * / // % ** ~ == < in and or'.split())} {inner()})"
    if kind == 5:
        return f"range({inner()}, {random.choice(SIZES)}, {random.choice(SIZES)})"
    if kind == 6:
        return f"({inner()} is {sized(random.choice(TESTS))})"
    if kind == 7:
        return f"({inner()})[{random.choice(['0', '-1', '::2', '::-1', ':99999999', inner()])}]"
    return f"({inner()} if {inner()} else {inner()})"


def statement(random: Random, depth: int = 0) -> str:
    value = expression(random)
    if depth > 4:
        return f"{{{{ {value} }}}}"
    body = "".join(statement(random, depth + 1) for _ in range(random.randrange(1, 3)))
    size = random.choice(SIZES)
    return random.choice(
        [
            f"{{{{ {value} }}}}",
            f"{{% for x in range({size}) %}}{body}{{% endfor %}}",
            f"{{% for m in messages %}}{{{{ m['role'] + m.content }}}}{body}{{% endfor %}}",
            f"{{% for x in {value} recursive %}}{{{{ loop({value}) }}}}{{% endfor %}}",
            f"{{% for x in range({size}) if x > {size} %}}{body}{{% else %}}{body}{{% endfor %}}",
            f"{{% if {value} %}}{body}{{% elif {value} %}}{body}{{% else %}}{body}{{% endif %}}",
            f"{{% set x = {value} %}}{body}",
            f"{{% set n = namespace(x='a') %}}{{% for i in range({size}) %}}{{% set n.x = n.x ~ n.x %}}{{% endfor %}}",
            f"{{% set n = namespace(x=[1]) %}}{{% for i in range({size}) %}}{{% set n.x = n.x + n.x %}}{{% endfor %}}",
            f"{{% macro f(x, y={size}) %}}{body}{{{{ f(x) }}}}{{% endmacro %}}{{{{ f({value}) }}}}",
            f"{{% macro g({random.choice(PARAMETERS)}) %}}{body}{{% endmacro %}}{{{{ g(1) }}}}",
            f"{{% call({random.choice(['', 'x', 'x,x'])}) f() %}}{body}{{% endcall %}}",
            f"{{% filter {random.choice(BLOCK_FILTERS)} %}}{body}{{% endfilter %}}",
            f"{{% with x = {value} %}}{body}{{% endwith %}}",
            f"{{% block b %}}{body}{{% endblock %}}{{{{ self.b() }}}}",
            f"{{% generation %}}{body}{{% endgeneration %}}",
            random.choice(
                ["{% break %}", "{% continue %}", "{% else %}", "{% endfor %}", "{{ }}", "{% set loop = 1 %}{{ loop }}"]
            ),
            random.choice(
                ["{{ cycler() }}", "{{ joiner(1)() }}", "{{ lipsum(99999, min=9, max=99999) }}", "{{ dict(1) }}"]
            ),
            random.choice(
                ["{% raw %}{{ x }}{% endraw %}", "{# {# #}", "{{ '\\ud800' }}", "{{ '\\x00' }}", "{{", "%}", "\0"]
            ),
        ]
    )


def made(random: Random) -> tuple[str, str]:
    return "made of the grammar", "".join(statement(random) for _ in range(random.randrange(1, 4)))


def escaping(random: Random) -> tuple[str, str]:
    text = random.choice(ESCAPES)
    return f"an escape, {text:.60}", text


def costly(random: Random) -> tuple[str, str]:
    """What does not fail, and is long in time or as a text."""
    first, second, third = (random.choice(["3", "99", "5000", "99999", "100000"]) for _ in range(3))
    inner = random.choice(
        ["", "x", "{{ a }}", "{{ messages[0].content * 1000 }}", "{% set c = 'a' * 99999 %}", "{{ 'a'|indent }}"]
    )
    wide = random.choice(
        ["center(N)", "indent(N)", "replace('a', 'b' * N)", "wordwrap(1, wrapstring='x' * N)", "join('x' * N)"]
    )
    wide = wide.replace("N", random.choice(["100000", "10000000", "300000000"]))
    text = random.choice(
        [
            f"{{% for a in range({first}) %}}{{% for b in range({second}) %}}{inner}{{% endfor %}}{{% endfor %}}",
            f"{{% for a in range({first}) %}}{{% for b in range({second}) %}}{{% for c in range({third}) %}}"
            + "{% endfor %}" * 3,
            f"{{{{ ('a\n' * {first})|{wide} }}}}",
            f"{{% set n = namespace(x='ab') %}}{{% for i in range({random.choice([20, 40, 99])}) %}}"
            "{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x|length }}",
            f"{{% set n = namespace(x=[1]) %}}{{% for i in range({random.choice([20, 40, 99])}) %}}"
            "{% set n.x = n.x + n.x %}{% endfor %}{{ n.x|length }}",
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
            f"{{{{ f({random.choice([9, 20, 60])}) }}}}",
            f"{{{{ range({first})|list|string }}}}{{{{ range({second})|map('string')|join('{'x' * 500}')|length }}}}",
            f"{{% for a in range({first}) %}}{{{{ range({second})|sum }}}}{{{{ messages|tojson(indent=9999) }}}}"
            "{% endfor %}",
            f"{{{{ [[[1] * {first}] * {second}] * {third} }}}}",
            f"{{{{ (('(' * {first})|urlize ~ ('<' * {second})|striptags ~ ('&' * {third})|escape)|length }}}}",
            f"{{% set x %}}{{% for a in range({first}) %}}{'y' * 5000}{{% endfor %}}{{% endset %}}{{{{ x * 99 }}}}",
        ]
    )
    return f"it costs, {text[:60]}", text


def deep(random: Random) -> tuple[str, str]:
    count = random.choice([15, 25, 110, 1000, 20_000])
    form = random.choice(
        [
            "{% if 1 %}" * count + "x" + "{% endif %}" * count,
            "{% for a in range(9) %}" * count + "x" + "{% endfor %}" * count,
            "{{ " + "(" * count + "1" + ")" * count + " }}",
            "{{ " + "[" * count + "]" * count + " }}",
            "{{ " + "not " * count + "1 }}",
            "{{ 1" + " + 1" * count + " }}",
            "{{ x" + ".a" * count + " }}",
            "{{ 'a'" + "|upper" * count + " }}",
            "{% macro m() %}" * count + "x" + "{% endmacro %}" * count,
            "{% set x %}" * count + "y" + "{% endset %}" * count,
            "{{ 'a' * 1000 }}" * count,
            "".join(
                f"{{% macro f{i}() %}}{{{{ f{i - 1}() }}}}{{{{ f{i - 1}() }}}}{{% endmacro %}}" for i in range(1, 40)
            ),
        ]
    )
    return f"{count} times {form[:30]}", form


def broken(random: Random, text: str) -> tuple[str, str]:
    """A real template with a part moved, doubled or left out."""
    first, second = sorted(random.randrange(len(text) + 1) for _ in range(2))
    part = random.choice(["", text[first:second] * random.choice([2, 200]), statement(random), "%}", "{{", "'", "-"])
    return f"characters {first} to {second} become {part:.40}", text[:first] + part + text[second:]


def template_of() -> Mutator:
    def mutate(random: Random, folder: Path) -> tuple[str, Expect]:
        path = folder / NAME
        text = path.read_text(encoding="utf-8")
        kinds: list[Callable[[], tuple[str, str]]] = [
            lambda: made(random),
            lambda: costly(random),
            lambda: escaping(random),
            lambda: deep(random),
            lambda: broken(random, text),
        ]
        said, template = random.choice(kinds)()
        path.write_bytes(template.encode("utf-8", "surrogatepass"))
        return f"{NAME}: {said}", FREE

    return mutate
