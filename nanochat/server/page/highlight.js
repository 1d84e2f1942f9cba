// Colours for code: highlight(text, lang) -> [[kind, text], ...] with kind "", key, str, num, com, fun or tag.
// Joined, the texts are the input. Every pattern is linear in the text; longer texts than MAX_CHARS stay plain.

export const MAX_CHARS = 50_000;

const words = (text) => new Set(text.split(" "));
const C_WORDS =
  "auto bool break case catch char class const constexpr continue default delete do double else enum explicit extern false " +
  "final float for friend goto if inline int long namespace new nullptr operator override private protected public return " +
  "short signed sizeof static struct switch template this throw true try typedef typename union unsigned using virtual void " +
  "volatile while include define ifdef ifndef endif package import interface extends implements abstract boolean byte null " +
  "super synchronized throws instanceof var record";
const SLASHES = /\/\/[^\n]*|\/\*[\s\S]*?(?:\*\/|$)/;
const HASH = /#[^\n]*/;
const QUOTES = /"(?:[^"\\\n]|\\[\s\S])*"?|'(?:[^'\\\n]|\\[\s\S])*'?/;

const LANGUAGES = {
  python: {
    comment: HASH,
    string: /[rRbBfFuU]{0,2}(?:"""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$)|"(?:[^"\\\n]|\\[\s\S])*"?|'(?:[^'\\\n]|\\[\s\S])*'?)/,
    keys: words(
      "False None True and as assert async await break case class continue def del elif else except finally for from global " +
        "if import in is lambda match nonlocal not or pass raise return self try while with yield",
    ),
  },
  js: {
    comment: SLASHES,
    string: /`(?:[^`\\]|\\[\s\S])*`?|"(?:[^"\\\n]|\\[\s\S])*"?|'(?:[^'\\\n]|\\[\s\S])*'?/,
    keys: words(
      "async await break case catch class const continue debugger default delete do else enum export extends false finally " +
        "for from function if implements import in instanceof interface let new null of return static super switch this " +
        "throw true try type typeof undefined var void while yield",
    ),
  },
  c: { comment: SLASHES, string: QUOTES, keys: words(C_WORDS) },
  rust: {
    comment: SLASHES,
    string: /b?"(?:[^"\\]|\\[\s\S])*"?|'(?:[^'\\\n]|\\.)'/,
    keys: words(
      "Self as async await box break const continue crate dyn else enum extern false fn for if impl in let loop match mod " +
        "move mut pub ref return self static struct super trait true type unsafe use where while",
    ),
  },
  go: {
    comment: SLASHES,
    string: /`[^`]*`?|"(?:[^"\\\n]|\\.)*"?|'(?:[^'\\\n]|\\.)*'?/,
    keys: words(
      "break case chan const continue default defer else fallthrough false for func go goto if import interface map nil " +
        "package range return select struct switch true type var",
    ),
  },
  bash: {
    comment: /(?<![\w$&])#[^\n]*/,
    string: /"(?:[^"\\]|\\[\s\S])*"?|'[^']*'?|\$\{?[\w@*#?!-]+\}?/,
    keys: words("if then else elif fi for while until do done case esac in function return local export set unset exit echo cd source"),
  },
  sql: {
    comment: /--[^\n]*|\/\*[\s\S]*?(?:\*\/|$)/,
    string: /'(?:[^']|'')*'?|"[^"]*"?/,
    isCaseless: true,
    keys: words(
      "all alter and as asc between by case create cross delete desc distinct drop else end exists false from full group " +
        "having in index inner insert into is join key left like limit not null offset on or order outer primary references " +
        "right select set table then true union unique update values view when where with",
    ),
  },
  json: { comment: /(?!)/, string: /"(?:[^"\\\n]|\\.)*"?/, keys: words("true false null") },
  html: { comment: /<!--[\s\S]*?(?:-->|$)/, string: /"[^"]*"?|'[^']*'?/, tag: /<\/?[A-Za-z][\w:-]*|\/?>/, keys: words("DOCTYPE") },
  css: { comment: /\/\*[\s\S]*?(?:\*\/|$)/, string: QUOTES, tag: /[.#@][A-Za-z_-][\w-]*|--[\w-]+/, keys: words("important") },
  yaml: { comment: HASH, string: QUOTES, tag: /^[ \t-]*[\w.-]+(?=:)/m, keys: words("true false null yes no on off") },
};

const NAMES = {
  py: "python", python3: "python", pycon: "python", javascript: "js", jsx: "js", ts: "js", tsx: "js", typescript: "js",
  mjs: "js", cpp: "c", "c++": "c", h: "c", hpp: "c", java: "c", cs: "c", csharp: "c", kotlin: "c", swift: "c", rs: "rust",
  golang: "go", sh: "bash", shell: "bash", zsh: "bash", console: "bash", postgres: "sql", sqlite: "sql", mysql: "sql",
  jsonl: "json", xml: "html", svg: "html", scss: "css", toml: "yaml", yml: "yaml", ini: "yaml",
};

const patterns = new Map();

function patternOf(name) {
  if (!patterns.has(name)) {
    const { comment, string, tag } = LANGUAGES[name];
    const groups = [["com", comment], ["str", string], ["tag", tag]].filter(([, rule]) => rule);
    const source = groups.map(([kind, rule]) => `(?<${kind}>${rule.source})`).join("|");
    const number = "(?<num>\\b(?:0[xX][\\da-fA-F_]+|0[bB][01_]+|\\d[\\d_]*(?:\\.\\d+)?(?:[eE][+-]?\\d+)?)\\b)";
    patterns.set(name, new RegExp(`${source}|${number}|(?<word>[A-Za-z_$][\\w$]*)`, "gm"));
  }
  return patterns.get(name);
}

export function highlight(text, lang) {
  const name = LANGUAGES[lang] ? lang : NAMES[lang];
  if (!name || text.length > MAX_CHARS) return [["", text]];
  const { keys, isCaseless } = LANGUAGES[name];
  const out = [];
  let at = 0;
  const push = (kind, piece) => {
    if (out.length && out.at(-1)[0] === kind) out.at(-1)[1] += piece;
    else if (piece) out.push([kind, piece]);
  };
  for (const match of text.matchAll(patternOf(name))) {
    if (!match[0]) continue;
    push("", text.slice(at, match.index));
    at = match.index + match[0].length;
    const [kind] = Object.entries(match.groups).find(([, found]) => found !== undefined);
    if (kind !== "word") push(kind, match[0]);
    else if (keys.has(isCaseless ? match[0].toLowerCase() : match[0])) push("key", match[0]);
    else push(text[at] === "(" ? "fun" : "", match[0]);
  }
  push("", text.slice(at));
  return out;
}
