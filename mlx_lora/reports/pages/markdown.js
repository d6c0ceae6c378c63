// A model's text as elements: paragraphs, headings, lists, quotes, bold, italics, inline code and code blocks.
// It makes elements and sets textContent; it never parses markup, so whatever a model writes is only ever text.
// Links are written out, not made: a model's address should be read before it is followed.
const INLINE =
  /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)|\*\*(?=\S)([\s\S]*?\S)\*\*|(?<![\w*])\*(?=[^\s*])([^*]*?[^\s*])\*(?![\w*])/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const FENCE = /^\s*(```+|~~~+)\s*([\w+#.-]*)[^`]*$/;

function element(tag, ...children) {
  const one = document.createElement(tag);
  one.append(...children);
  return one;
}

function inline(text) {
  const parts = [];
  for (let rest = text; rest; ) {
    const found = INLINE.exec(rest);
    if (!found) {
      parts.push(rest);
      break;
    }
    const [whole, , code, bold, italic] = found;
    if (found.index) parts.push(rest.slice(0, found.index));
    if (code !== undefined) parts.push(element("code", code.replace(/^ (.*) $/, "$1")));
    else if (bold !== undefined) parts.push(element("strong", ...inline(bold)));
    else parts.push(element("em", ...inline(italic)));
    rest = rest.slice(found.index + whole.length);
  }
  return parts;
}

// Returns the elements of a text, which may be unfinished: an open code block reaches to its end.
// biome-ignore lint/correctness/noUnusedVariables: the chat page and the studio's page call it.
function markdown(text) {
  const blocks = [];
  const lines = text.split("\n");
  let paragraph = [];
  const flush = () => {
    if (paragraph.length) blocks.push(element("p", ...inline(paragraph.join("\n"))));
    paragraph = [];
  };
  for (let at = 0; at < lines.length; at++) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    const heading = /^#{1,6}\s+(.*)$/.exec(line);
    if (fence) {
      flush();
      const code = [];
      while (++at < lines.length && !lines[at].trim().startsWith(fence[1])) code.push(lines[at]);
      blocks.push(element("pre", element("code", code.join("\n"))));
    } else if (heading) {
      flush();
      blocks.push(element("h3", ...inline(heading[1])));
    } else if (ITEM.test(line)) {
      flush();
      let end = at;
      while (end + 1 < lines.length && (ITEM.test(lines[end + 1]) || /^\s+\S/.test(lines[end + 1]))) end++;
      blocks.push(list(lines.slice(at, end + 1)));
      at = end;
    } else if (/^>\s?/.test(line)) {
      flush();
      const quoted = [line];
      while (at + 1 < lines.length && /^>\s?/.test(lines[at + 1])) quoted.push(lines[++at]);
      blocks.push(
        element("blockquote", element("p", ...inline(quoted.map((one) => one.replace(/^>\s?/, "")).join("\n")))),
      );
    } else if (line.trim()) paragraph.push(line);
    else flush();
  }
  flush();
  return blocks;
}

// Returns the list of lines that begin with an item; deeper items belong to the one above them.
function list(lines) {
  const [, indent, mark] = ITEM.exec(lines[0]);
  const one = element(/\d/.test(mark) ? "ol" : "ul");
  if (/\d/.test(mark)) one.start = parseInt(mark, 10);
  for (let at = 0; at < lines.length; at++) {
    const found = ITEM.exec(lines[at]);
    if (found && found[1].length <= indent.length) {
      one.append(element("li", ...inline(found[3])));
    } else if (found) {
      const deeper = [];
      while (at < lines.length && !((ITEM.exec(lines[at]) || [])[1]?.length <= indent.length)) deeper.push(lines[at++]);
      at--;
      one.lastChild.append(list(deeper));
    } else one.lastChild.append("\n", ...inline(lines[at].trim()));
  }
  return one;
}
