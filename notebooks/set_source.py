"""Write into notebooks and pages where this clone came from: Colab badges and the lines that install need it.

    make badges

It is what `git remote get-url origin` says, a repository on GitHub by https or ssh. Another time it is written over.
"""

import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
ORIGIN = re.compile(r"(?:https://(?:[^/@]+@)?|(?:ssh://)?git@)github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?/?")
PAGES = ("README.md", "README.zh.md")
NAMED = re.compile(r"((?:github\.com|/github)/)[\w.-]+/[\w.-]+?(?=/blob/main/(?:notebooks|docs)/|\\\"|')")


def main() -> None:
    ran = subprocess.run(["git", "remote", "get-url", "origin"], cwd=FOLDER, capture_output=True, text=True)
    url = ran.stdout.strip()
    if (origin := ORIGIN.fullmatch(url)) is None:
        what = f"origin is {url}, which is not on GitHub" if url else "this clone has no origin"
        print(f"error: {what}; git remote set-url origin https://github.com/ACCOUNT/REPOSITORY.", file=sys.stderr)
        sys.exit(2)
    pages = [path for path in map(FOLDER.parent.joinpath, PAGES) if path.exists()]
    for path in [*sorted(FOLDER.glob("*.ipynb")), *pages]:
        text, count = NAMED.subn(rf"\g<1>{origin[1]}", path.read_text(encoding="utf-8"))
        path.write_text(text, encoding="utf-8")
        print(f"{path.name}: {origin[1]}, in {count} places")


if __name__ == "__main__":
    main()
