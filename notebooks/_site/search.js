/* What the search page shows: sections, each with an excerpt. SECTIONS holds [address, page, title, text, code] of each.
   The stems of words, the words that don't count, and the box to type in are Sphinx's. */
(() => {
  const SHOWN = 40, BEFORE = 8, EXCERPT = 34; // results; words of an excerpt, in front of the first hit and in all
  const WORD = /\p{Lu}{2,}(?=\p{Lu}\p{Ll}{2})|[\p{L}\p{N}]+/gu; // KVCache is two
  const stemmer = new Stemmer();
  const stems = new Map();

  const stem = (word) => {
    if (!stems.has(word)) stems.set(word, stemmer.stemWord(word.toLowerCase()));
    return stems.get(word);
  };
  const words = (text) => [...text.matchAll(WORD)].map((found) => ({
    stem: stem(found[0]), start: found.index, end: found.index + found[0].length,
  }));
  const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);

  /* Okapi BM25, where a word of the title counts five times, and one of the code a quarter. First come sections with more
     of the query's words. */
  function search(wanted) {
    const all = SECTIONS.map(([address, page, ...fields]) => {
      const parts = fields.map((text, i) => ({ text, words: words(text), weight: [5, 1, 0.25][i] }));
      const count = (holds) => sum(parts.map((part) => part.weight * part.words.filter(holds).length));
      return { address, page, parts, counts: wanted.map((each) => count((word) => word.stem === each)), length: count(() => true) };
    });
    const mean = sum(all.map((section) => section.length)) / all.length;
    const rarity = wanted.map((_, i) => Math.log(1 + all.length / (1 + all.filter((section) => section.counts[i]).length)));
    for (const section of all) {
      const share = 0.3 + (0.9 * section.length) / mean;
      section.score = sum(section.counts.map((n, i) => (rarity[i] * n) / (n + share)));
      section.has = section.counts.filter(Boolean).length;
    }
    const most = Math.max(...all.map((section) => section.has));
    return all.filter((section) => most && section.has === most).sort((a, b) => b.score - a.score);
  }

  /* The stretch of the text, or else of the code, that holds most of the query's words, as nodes in which they are marked. */
  function excerpt([, prose, code], wanted) {
    const places = (part) => part.words.flatMap((word, i) => (wanted.includes(word.stem) ? [i] : []));
    const shownPart = places(prose).length || !places(code).length ? prose : code;
    const { text, words: inText } = shownPart, hits = places(shownPart);
    const held = (first) => new Set(hits.filter((i) => i >= first && i < first + EXCERPT - BEFORE).map((i) => inText[i].stem)).size;
    const best = hits.reduce((best, i) => (held(i) > held(best) ? i : best), hits[0] ?? 0);
    const from = Math.max(0, best - BEFORE), shown = inText.slice(from, from + EXCERPT);
    const nodes = [from ? "… " : ""];
    let end = from ? shown[0].start : 0;
    for (const word of shown.filter((word) => wanted.includes(word.stem))) {
      const mark = document.createElement("mark");
      mark.textContent = text.slice(word.start, word.end);
      nodes.push(text.slice(end, word.start), mark);
      end = word.end;
    }
    const last = shown.at(-1)?.end ?? 0;
    return [...nodes, text.slice(end, last), from + EXCERPT < inText.length ? " …" : text.slice(last)];
  }

  function line(tag, name, ...content) {
    const node = document.createElement(tag);
    node.className = name;
    node.append(...content);
    return node;
  }

  Search.performSearch = (query) => {
    const typed = words(query);
    const telling = typed.filter((word) => !stopwords.has(query.slice(word.start, word.end).toLowerCase()));
    const wanted = [...new Set((telling.length ? telling : typed).map((word) => word.stem))];
    const found = wanted.length ? search(wanted) : [];
    const items = found.slice(0, SHOWN).map((section) => {
      const link = line("a", "", section.parts[0].text);
      link.href = section.address;
      return line("li", "", link, " ", line("span", "where", section.page), line("p", "", ...excerpt(section.parts, wanted)));
    });
    const count = found.length > SHOWN ? `The ${SHOWN} best of ${found.length} sections` : `Sections: ${found.length}`;
    const status = line("p", "", found.length ? count : "Nothing found. Try other words, or fewer.");
    status.setAttribute("role", "status");
    const out = document.getElementById("search-results");
    out.append(line("h1", "", `Search: ${query}`), status, line("ol", "found", ...items));
  };
})();
