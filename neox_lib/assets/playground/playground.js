// The playground's page. Values flow down from the kernel (model.get), requests go up as messages (model.send). A reload
// loses only what is being typed: the kernel has the rest, and where it ends with its page, the tab. All text is set as
// textContent.

const LEVELS = [
  [0.5, "50 % or more"],
  [0.1, "10 to 50 %"],
  [0.01, "1 to 10 %"],
  [0, "below 1 %"],
];
const SVG = "http://www.w3.org/2000/svg";
const BUSY_AFTER = 1500; // milliseconds without an answer
let views = 0;

const levelOf = (probability) => LEVELS.findIndex(([least]) => probability >= least);

function percent(probability) {
  if (probability < 0.001) return "< 0.1 %";
  return `${(100 * probability).toFixed(probability >= 0.1 ? 0 : 1)} %`;
}

// Spaces and line ends are made visible where a token stands on its own.
const visible = (text) => text.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  // Keys belong to the playground, not to the notebook's shortcuts. Lab looks for this on the very node with the focus.
  if (["button", "input", "select", "textarea"].includes(tag) || "tabindex" in attributes) node.dataset.lmSuppressShortcuts = "true";
  // Lab takes Shift+Enter's line break out of all that stands in a cell, by a later listener on this node.
  if (tag === "textarea") node.addEventListener("beforeinput", (event) => event.stopImmediatePropagation());
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value !== undefined && value !== null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

function makeSvg(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// Fills a list anew and keeps the keyboard's focus at its place in it: on the list itself while that is empty.
function filler(list) {
  let place = 0;
  return (nodes) => {
    const held = list.contains(document.activeElement);
    if (held && document.activeElement !== list) place = [...list.querySelectorAll("button")].indexOf(document.activeElement);
    list.replaceChildren(...nodes);
    const buttons = list.querySelectorAll("button");
    if (held) (buttons[Math.min(place, buttons.length - 1)] ?? list).focus({ preventScroll: true });
  };
}

// What the tab keeps for a reload. A notebook's kernel outlives its page; that of an app does not, and an output that
// was never saved is gone. Running a cell again on the same page starts afresh.
function keepForReload(model, root, ask) {
  const { kind } = model.get("facts");
  const number = [...document.querySelectorAll(".np")].filter((other) => other.dataset.kind === kind).length;
  const key = `playground ${number} ${(root.dataset.kind = kind)}`;
  const page = performance.timeOrigin;
  const keep = () => {
    try {
      sessionStorage.setItem(key, JSON.stringify({ page, saved: model.get("saved") }));
    } catch {} // forbidden or full: then a reload starts empty
  };
  let kept = null;
  try {
    kept = JSON.parse(sessionStorage.getItem(key));
  } catch {}
  if (kept && kept.page !== page && !model.get("saved").branches.length) ask("restore", { saved: kept.saved });
  else keep();
  model.on("change:saved", keep);
}

const heading = (id, text) => make("h3", { id, class: "np-heading" }, text);

// What goes up to the kernel, and whether it has answered.
function messenger(model, root, onSilence) {
  let sent = 0;
  let timer = null;
  const answered = () => model.get("heard") >= sent;
  model.on("change:heard", () => {
    if (!answered()) return;
    root.dataset.answered = "true";
    clearTimeout(timer);
    onSilence(false);
  });
  return {
    answered,
    send(action, more = {}) {
      sent = Math.max(sent + 1, Date.now());
      root.dataset.answered = "false";
      clearTimeout(timer);
      try {
        model.send({ do: action, number: sent, ...more });
      } catch {
        return onSilence(true); // the kernel was restarted: nobody is there to hear it
      }
      return (timer = setTimeout(() => answered() || onSilence(true), BUSY_AFTER));
    },
  };
}

// The prompt: a text field, its tokens as spans, ready prompts.
function promptPart(model, id, post, generate) {
  const field = make("textarea", { id: `${id}-prompt`, rows: 1, spellcheck: "false", "aria-describedby": `${id}-count` });
  const count = make("span", { id: `${id}-count`, class: "np-note" });
  const spans = make("div", { class: "np-spans", role: "img", tabindex: 0 });
  const ids = make("input", { type: "checkbox", id: `${id}-ids` });
  const note = make("p", { class: "np-warning" });
  ids.addEventListener("change", () => spans.classList.toggle("np-with-ids", ids.checked));
  let timer = null;
  const tell = () => {
    clearTimeout(timer);
    timer = null;
    post.send("prompt", { prompt: field.value });
  };
  field.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(tell, 120);
  });
  field.addEventListener("blur", () => timer !== null && tell());
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      generate();
    }
  });
  const ready = make("div", { class: "np-row", role: "group", "aria-label": "Ready prompts" }, make("span", { class: "np-note" }, "try:"));
  for (const [name, text] of model.get("facts").prompts ?? []) {
    const button = make("button", { type: "button", class: "np-small", title: text }, name);
    button.addEventListener("click", () => {
      field.value = text;
      tell();
    });
    ready.append(button);
  }
  const typed = () => timer !== null || !post.answered() || (document.activeElement === field && post.mayDiffer);
  const settle = () => typed() || (field.value = model.get("prompt")); // what is typed and not yet heard stays
  const update = () => {
    const { tokens = [], count: total = 0, over, note: remark = "", ms = 0 } = model.get("prompt_view");
    settle();
    count.textContent = `${total.toLocaleString("en")} tokens of ${model.get("facts").context.toLocaleString("en")} · ${ms} ms`;
    note.textContent = remark;
    note.classList.toggle("np-over", Boolean(over));
    spans.replaceChildren(
      ...tokens.map(([token, text, control], index) => {
        const span = make("span", { title: `id ${token}`, "data-id": token, class: `np-prompt-token np-tone${index % 2}${control ? " np-control" : ""}` });
        span.textContent = text === "" ? "◌" : visible(text);
        return span;
      }),
    );
    if (total > tokens.length) spans.append(` … and ${total - tokens.length} more`);
    if (typed() && field.selectionEnd === field.value.length) spans.scrollTop = spans.scrollHeight;
    spans.setAttribute("aria-label", `The prompt's tokens with their ids: ${tokens.slice(0, 60).map(([token, text]) => `${text || "part of a character"} ${token}`).join(", ")}`);
  };
  model.on("change:prompt_view", update);
  model.on("change:heard", settle);
  field.addEventListener("focus", () => (post.mayDiffer = true));
  update();
  field.value = model.get("prompt");
  const top = make("div", { class: "np-row np-spread" }, make("label", { for: `${id}-prompt`, class: "np-heading" }, "Prompt"), count);
  const show = make("label", { class: "np-note np-check", for: `${id}-ids` }, ids, "show ids");
  return { field, node: make("div", { role: "group", "aria-label": "The prompt and its tokens" }, top, field, note, make("div", { class: "np-row np-top" }, spans, show), ready) };
}

// Every control of the settings; their values travel with each message that needs them.
function settingsPart(model, id, post) {
  const fields = {};
  const number = (name, label, attributes) => {
    fields[name] = make("input", { type: "number", id: `${id}-${name}`, ...attributes });
    return make("label", { for: `${id}-${name}`, class: "np-field" }, label, fields[name]);
  };
  const choice = make("select", { id: `${id}-sampled` }, make("option", { value: "" }, "greedy"), make("option", { value: "1" }, "sampled"));
  fields.sampled = choice;
  fields.use_cache = make("input", { type: "checkbox", id: `${id}-use_cache` });
  const drawn = make("div", { class: "np-row", role: "group", "aria-label": "Sampling" });
  drawn.append(
    number("temperature", "temperature", { min: 0.05, max: 5, step: 0.05 }),
    number("top_k", "top-k (0: all)", { min: 0, step: 1 }),
    number("top_p", "top-p", { min: 0.05, max: 1, step: 0.05 }),
    number("min_p", "min-p", { min: 0, max: 1, step: 0.01 }),
    number("seed", "seed", { min: 0, step: 1 }),
  );
  // One stop string per line, a line break in one as \n.
  const shownStop = (stop) => stop.replaceAll("\\", "\\\\").replaceAll("\n", "\\n");
  const typedStop = (line) => line.replace(/\\(.)/g, (_, letter) => (letter === "n" ? "\n" : letter));
  const stops = make("textarea", { id: `${id}-stop_strings`, rows: 1, cols: 12, spellcheck: false, title: "one text per line; \\n is a line break" });
  fields.stop_strings = stops;
  const row = make("span", { class: "np-row" });
  row.append(
    number("tokens", "tokens", { min: 1, max: model.get("facts").context, step: 1 }),
    make("label", { for: `${id}-sampled`, class: "np-field" }, "choice", choice),
    make("label", { for: `${id}-use_cache`, class: "np-field np-check" }, fields.use_cache, "KV cache"),
    number("repetition_penalty", "repetition penalty", { min: 0.05, max: 5, step: 0.05 }),
    make("label", { for: `${id}-stop_strings`, class: "np-field" }, "stop before", stops),
  );
  const values = () => {
    const read = {};
    for (const [name, field] of Object.entries(fields)) {
      if (field.type === "checkbox") read[name] = field.checked;
      else if (field === choice) read[name] = choice.value !== "";
      else if (field === stops) read[name] = stops.value.split("\n").filter(Boolean).map(typedStop);
      else read[name] = Number.isFinite(field.valueAsNumber) ? field.valueAsNumber : model.get("settings")[name];
    }
    return read;
  };
  const update = () => {
    const settings = model.get("settings");
    for (const [name, field] of Object.entries(fields)) {
      if (field === document.activeElement) continue;
      if (field.type === "checkbox") field.checked = settings[name];
      else if (field === choice) choice.value = settings.sampled ? "1" : "";
      else if (field === stops) stops.value = settings[name].map(shownStop).join("\n");
      else field.value = settings[name];
    }
    drawn.hidden = choice.value === "";
  };
  for (const [name, field] of Object.entries(fields)) {
    field.addEventListener("change", () => {
      if (field.value === "" && field.type === "number") field.value = model.get("settings")[name];
      drawn.hidden = choice.value === "";
      post.send("settings", { settings: values() });
    });
  }
  model.on("change:settings", update);
  update();
  return { values, row, drawn };
}

// The text as a list of tokens in which the arrow keys walk; the last place stands for the next token.
function textPart(model, id, post, ask) {
  const list = make("div", { class: "np-text", role: "listbox", tabindex: 0, "aria-label": "Text, token by token: arrow keys choose one" });
  const end = make("span", { class: "np-end", role: "option", "aria-label": "the next token" });
  const told = make("p", { class: "np-told np-note", "aria-hidden": "true" });
  let rows = [];
  let nodes = [];
  let cursor = 0;
  let timer = null;
  const describe = (index) => {
    if (index >= rows.length) return "the next token";
    const [token, text, control, score] = rows[index];
    const share = score === null ? "of the prompt" : percent(Math.exp(score));
    return `${control ? text : text === "" ? "part of a character" : visible(text)}, ${share}, id ${token}, position ${index}`;
  };
  let follow = ""; // what the next run brings into view: "page" for Generate, "list" for a token taken beside it
  const atEnd = () => list.scrollHeight - list.scrollTop - list.clientHeight < 8;
  const mark = () => {
    cursor = Math.max(0, Math.min(cursor, rows.length));
    for (const node of list.querySelectorAll('[aria-selected="true"]')) node.setAttribute("aria-selected", "false");
    const node = nodes[cursor] ?? end;
    node.setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", node.id);
    told.textContent = rows.length ? describe(cursor) : "";
    return node;
  };
  const draw = () => {
    const next = [...(model.get("text").rows ?? []), ...model.get("tail")];
    let same = 0;
    while (same < rows.length && same < next.length && rows[same][0] === next[same][0] && rows[same][3] === next[same][3]) same += 1;
    for (const node of nodes.splice(same)) node.remove();
    for (let index = same; index < next.length; index += 1) {
      const [, text, control, score] = next[index];
      const node = make("span", { role: "option", id: `${id}-t${index}`, "aria-selected": "false", class: "np-token" });
      node.classList.add(score === null ? "np-given" : `np-level${levelOf(Math.exp(score))}`);
      node.classList.toggle("np-control", Boolean(control));
      node.textContent = text;
      node.dataset.index = index;
      list.insertBefore(node, end);
      nodes.push(node);
    }
    rows = next;
    for (let index = same; index < rows.length; index += 1) {
      nodes[index].title = describe(index);
      nodes[index].setAttribute("aria-label", describe(index));
    }
  };
  const choose = (index) => {
    cursor = Math.max(0, Math.min(index, rows.length));
    const [box, frame] = [mark().getBoundingClientRect(), list.getBoundingClientRect()];
    if (box.top < frame.top || box.bottom > frame.bottom) list.scrollTop += box.top - frame.top - list.clientHeight / 2;
    follow = "";
    clearTimeout(timer);
    timer = setTimeout(() => {
      timer = null;
      ask("look", { position: cursor });
    }, 120);
  };
  end.id = `${id}-end`;
  list.append(end);
  list.addEventListener("click", (event) => {
    const node = event.target.closest("[role=option]");
    if (node && rows.length) choose(node === end ? rows.length : Number(node.dataset.index));
  });
  list.addEventListener("keydown", (event) => {
    const lines = { ArrowDown: 1, ArrowUp: -1 };
    const moves = { ArrowRight: cursor + 1, ArrowLeft: cursor - 1, Home: 0, End: rows.length };
    if (event.key in lines) choose(lineAway(lines[event.key]));
    else if (event.key in moves) choose(moves[event.key]);
    else return;
    event.preventDefault();
  });
  const lineAway = (direction) => {
    const from = (nodes[cursor] ?? end).getBoundingClientRect();
    const all = [...nodes, end];
    let best = cursor;
    let least = Infinity;
    all.forEach((node, index) => {
      const box = node.getBoundingClientRect();
      const down = (box.top - from.top) * direction;
      const distance = down * 4 + Math.abs(box.left - from.left);
      if (down > 4 && distance < least) [best, least] = [index, distance];
    });
    return best;
  };
  const update = () => {
    const following = follow !== "" || atEnd(); // whoever has scrolled up to read is left there
    draw();
    if (timer === null && post.answered()) cursor = model.get("marks").chosen;
    mark();
    if (following && cursor === rows.length) {
      list.scrollTop = list.scrollHeight;
      if (follow === "page") list.scrollIntoView({ block: "nearest" });
    }
    if (post.answered() && ["writing", "idle"].includes(model.get("marks").phase)) follow = "";
  };
  model.on("change:text change:tail change:marks change:heard", update);
  update();
  new ResizeObserver((_, self) => {
    if (!list.clientHeight) return;
    list.scrollTop = list.scrollHeight; // a reloaded page shows the end of its text
    self.disconnect();
  }).observe(list);
  const samples = LEVELS.map(([, name], level) => make("span", { class: `np-token np-level${level} np-sample` }, name));
  const legend = make("p", { class: "np-legend np-note" }, "probability: ", ...samples);
  return { choose, follow: (what) => (follow = what), cursor: () => cursor, rows: () => rows, node: [list, told, legend] };
}

// What the user says next. The field is emptied when the kernel has heard and taken it, not before: nothing typed is lost.
function sayPart(model, id, post, say) {
  const field = make("textarea", { id: `${id}-say`, rows: 1, title: "Enter sends, Shift+Enter begins a new line" });
  let sent = "";
  const send = () => {
    if (sent || !field.value.trim() || ["reading", "writing"].includes(model.get("marks").phase)) return;
    say((sent = field.value));
  };
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  model.on("change:heard", () => {
    if (!sent || !post.answered()) return;
    if (model.get("marks").error === "" && field.value.startsWith(sent)) field.value = field.value.slice(sent.length);
    sent = "";
  });
  const button = make("button", { type: "button", class: "np-main", onclick: send }, "Send");
  const label = make("label", { for: `${id}-say`, class: "np-heading" }, "Say");
  return { button, node: make("div", { class: "np-row np-say" }, label, field, button) };
}

// The ten likeliest tokens; each is a button that takes that token.
function nextPart(model, ask) {
  const title = make("p", { class: "np-note" });
  const list = make("ol", { class: "np-bars", tabindex: -1, "aria-label": "The likeliest tokens" });
  const fill = filler(list);
  const rest = make("p", { class: "np-note" });
  let drawn = null; // while text streams past, bars that stay keep the keyboard's focus
  const update = () => {
    const { position, before = "", rows = [], rest: left = 0, taken } = model.get("bars");
    const looked = rows.length > 0;
    const hint = () => {
      if (!model.get("tail").length && !(model.get("text").rows ?? []).length) return "Generate a text, then choose a token in it.";
      if (position === 0) return "Nothing stands before the first token.";
      if (model.get("marks").phase !== "writing") return "Choose a token of the text, to see what could have stood there.";
      if (model.get("settings").use_cache) return "Choose a token of the text, even while it grows: the model looks between two tokens.";
      return "Without the cache a look would read the whole text again: the bars come when the writing stops.";
    };
    const use = taken ? "Take another token, and a branch forks off:" : "Take a token, and the text goes on with it:";
    title.textContent = looked ? `Position ${position}, after “…${visible(before)}”. ${use}` : hint();
    if (drawn === model.get("bars")) return;
    drawn = model.get("bars");
    fill(rows.map(([token, text, score, rank]) => {
      const share = Math.exp(score);
      const here = taken && taken[0] === token;
      const name = make("span", { class: "np-name" });
      name.textContent = visible(text);
      const bar = make("span", { class: "np-bar" }, make("span", { style: `width: ${100 * share}%` }));
      const cells = [name, bar, make("span", { class: "np-share" }, percent(share))];
      if (here) return make("li", {}, make("div", { class: "np-here" }, ...cells, "is here"));
      const label = `Take: ${visible(text)}, ${percent(share)}, rank ${rank}`;
      const button = make("button", { type: "button", "data-token": token, "aria-label": label }, ...cells, make("span", { class: "np-chip" }, "take"));
      button.addEventListener("click", () => ask("take", { token }));
      return make("li", {}, button);
    }));
    const others = model.get("facts").vocabulary - rows.length;
    rest.textContent = looked ? `The other ${others.toLocaleString("en")} tokens together: ${percent(left)}.` : "";
    if (looked && taken && taken[3] > rows.length) rest.textContent += ` The text has ${visible(taken[1])} here: rank ${taken[3]}, ${percent(Math.exp(taken[2]))}.`;
  };
  model.on("change:bars change:text", update);
  update();
  return [title, list, rest];
}

// What one head looks at from the chosen token: heat on the text, and the five strongest in words.
function attentionPart(model, id, post, text) {
  const { layers, heads } = model.get("facts");
  const options = (count) => Array.from({ length: count }, (_, index) => make("option", { value: index }, String(index)));
  const layer = make("select", { id: `${id}-layer` }, ...options(layers));
  const head = make("select", { id: `${id}-head` }, ...options(heads));
  const title = make("p", { class: "np-note" });
  const heat = make("div", { class: "np-heat", role: "img" });
  const list = make("ol", { class: "np-strongest" });
  let drawn = null;
  const tell = () => post.send("head", { layer: Number(layer.value), head: Number(head.value) });
  layer.addEventListener("change", tell);
  head.addEventListener("change", tell);
  const step = (by) => make("button", { type: "button", class: "np-small", onclick: () => text.choose(text.cursor() + by) }, by < 0 ? "‹ token" : "token ›");
  const update = () => {
    const { layer: ofLayer = 0, head: ofHead = 0, weights = [] } = model.get("attention");
    if (document.activeElement !== layer) layer.value = ofLayer;
    if (document.activeElement !== head) head.value = ofHead;
    if (drawn === model.get("attention") && weights.length) return;
    drawn = model.get("attention");
    const rows = text.rows();
    const named = (index) => (rows[index] ? visible(rows[index][1]) : "");
    const order = weights.map((weight, index) => [weight, index]).sort(([a], [b]) => b - a).slice(0, 5);
    const place = new Map(order.map(([, index], rank) => [index, rank + 1]));
    title.textContent = weights.length
      ? `From ${named(weights.length - 1)} (position ${weights.length - 1}), head ${ofHead} of layer ${ofLayer} looks at:`
      : model.get("marks").phase === "writing"
        ? "A look at the attention reads the text once more: it comes when the writing stops."
        : "Choose a token of the text: this shows at which tokens before it a head looks.";
    heat.replaceChildren(...weights.map((weight, index) => {
      const node = make("span", { class: `np-glow${index === weights.length - 1 ? " np-from" : ""}`, style: `--glow: ${Math.round(100 * Math.sqrt(weight))}%`, title: `position ${index}: ${percent(weight)}` });
      node.textContent = rows[index] ? rows[index][1] : "";
      if (place.has(index)) node.append(make("sup", {}, String(place.get(index))));
      return node;
    }));
    heat.scrollTop = heat.scrollHeight; // to the token that looks
    list.replaceChildren(...order.map(([weight, index]) => {
      const name = make("span", { class: "np-name" });
      name.textContent = named(index);
      const bar = make("span", { class: "np-bar" }, make("span", { style: `width: ${100 * weight}%` }));
      return make("li", {}, name, bar, make("span", { class: "np-share" }, percent(weight)), make("span", { class: "np-note" }, `position ${index}`));
    }));
    heat.setAttribute("aria-label", `${title.textContent} ${order.map(([weight, index]) => `${named(index)} ${percent(weight)}`).join(", ")}`);
  };
  model.on("change:attention change:text change:marks", update);
  update();
  const field = (label, node) => make("label", { for: node.id, class: "np-field" }, label, node);
  return [make("div", { class: "np-row" }, field("layer", layer), field("head", head), step(-1), step(1)), title, heat, list];
}

// What the model would say at the chosen position if it ended after each layer; the embedding comes first.
function lensPart(model) {
  const title = make("p", { class: "np-note" });
  const body = make("tbody", {});
  const column = make("th", { scope: "col" });
  const head = make("tr", {}, make("th", { scope: "col" }, "after"), make("th", { scope: "col", colspan: 2 }, "it would say"), column);
  const table = make("table", { class: "np-lens" }, make("thead", {}, head), body);
  const update = () => {
    const { position, last = "", rows = [] } = model.get("lens");
    table.hidden = !rows.length;
    title.textContent = rows.length
      ? `Position ${position}, read through the last norm and the output matrix after each layer:`
      : model.get("marks").phase === "writing"
        ? "The lens reads the text once more: it comes when the writing stops."
        : "Choose a token of the text: this shows what each layer would have said there.";
    column.textContent = `of ${visible(last)}`;
    body.replaceChildren(...rows.map(([word, score, ofLast], depth) => {
      const name = make("td", { class: "np-name" });
      name.textContent = visible(word);
      const bar = make("span", { class: "np-bar" }, make("span", { style: `width: ${100 * Math.exp(ofLast)}%` }));
      const where = depth ? `layer ${depth - 1}` : "embedding";
      return make("tr", {}, make("th", { scope: "row" }, where), name, make("td", {}, percent(Math.exp(score))), make("td", {}, bar, " ", percent(Math.exp(ofLast))));
    }));
  };
  model.on("change:lens change:marks", update);
  update();
  return [title, table];
}

// Milliseconds per token against position, with the cache and without: two lines that differ in dashes too.
function costPart(model) {
  const chart = makeSvg("svg", { viewBox: "0 0 440 230", class: "np-chart", role: "img" });
  const summary = make("p", { class: "np-note" });
  const needs = make("p", { class: "np-note np-needs" });
  const update = () => {
    const costs = model.get("costs");
    const curves = [["with", "with cache", "np-with"], ["without", "without: all is read again", "np-without"]];
    const all = curves.flatMap(([name]) => costs[name] ?? []);
    const right = Math.max(64, ...all.map(([position]) => position));
    const ordered = all.map(([, value]) => value).sort((a, b) => a - b);
    const top = Math.max(1, 1.15 * (ordered[Math.floor(0.98 * (ordered.length - 1))] ?? 1));
    const x = (position) => 46 + (380 * position) / right;
    const y = (value) => 190 - (142 * Math.min(value, top)) / top;
    const label = (attributes, text) => makeSvg("text", attributes, text);
    const nodes = [
      makeSvg("path", { d: "M46 44V190H430", class: "np-axis" }),
      label({ x: 6, y: 14 }, "ms per token"),
      label({ x: 40, y: 194, "text-anchor": "end" }, "0"),
      label({ x: 40, y: y(top / 1.15) + 4, "text-anchor": "end" }, (top / 1.15).toFixed(top > 11 ? 0 : 1)),
      label({ x: 430, y: 206, "text-anchor": "end" }, String(right)),
      label({ x: 238, y: 222, "text-anchor": "middle" }, "position in the text"),
    ];
    curves.forEach(([name, title, kind], index) => {
      const points = costs[name] ?? [];
      if (!points.length) return;
      nodes.push(makeSvg("polyline", { points: points.map(([position, value]) => `${x(position)},${y(value)}`).join(" "), class: `np-line ${kind}` }));
      nodes.push(makeSvg("path", { d: `M228 ${12 + 18 * index}H264`, class: `np-line ${kind}` }));
      nodes.push(label({ x: 270, y: 16 + 18 * index }, title));
    });
    const told = curves.filter(([name]) => (costs[name] ?? []).length).map(([name, title]) => {
      const [first, last] = [costs[name][0], costs[name].at(-1)];
      return `${title.split(":")[0]} cache`.replace("cache cache", "cache") + `: ${first[1].toFixed(1)} ms at position ${Math.round(first[0])}, ${last[1].toFixed(1)} ms at ${Math.round(last[0])}`;
    });
    summary.textContent = told.length ? `${told.join("; ")}.` : "Generate with the KV cache, then without it: both lines stay to compare.";
    chart.setAttribute("aria-label", `Milliseconds per token by position. ${summary.textContent}`);
    chart.replaceChildren(...nodes);
  };
  const tell = () => (needs.textContent = model.get("needs"));
  model.on("change:costs", update);
  model.on("change:needs", tell);
  update();
  tell();
  return [chart, summary, needs];
}

function tabs(id, pages, onChange) {
  const list = make("div", { role: "tablist", class: "np-tabs", "aria-label": "Views" });
  const panels = [];
  const buttons = [];
  const select = (index, focus) => {
    buttons.forEach((button, number) => {
      button.setAttribute("aria-selected", String(number === index));
      button.tabIndex = number === index ? 0 : -1;
      panels[number].hidden = number !== index;
    });
    if (focus) buttons[index].focus();
    onChange(index);
  };
  pages.forEach(([name, content], index) => {
    const button = make("button", { type: "button", role: "tab", id: `${id}-tab${index}`, "aria-controls": `${id}-panel${index}` }, name);
    button.addEventListener("click", () => select(index));
    button.addEventListener("keydown", (event) => {
      const to = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: pages.length - 1 }[event.key];
      if (to !== undefined) select((to + pages.length) % pages.length, true);
    });
    buttons.push(button);
    panels.push(make("div", { role: "tabpanel", id: `${id}-panel${index}`, "aria-labelledby": `${id}-tab${index}`, class: "np-panel" }, ...content));
  });
  list.append(...buttons);
  return { node: [list, ...panels], select };
}

function branchesPart(model, id, ask) {
  const title = heading(`${id}-branches`, "Branches, side by side");
  const list = make("ol", { class: "np-branches", tabindex: -1, "aria-labelledby": `${id}-branches` });
  const fill = filler(list);
  const update = () => {
    const branches = model.get("branches");
    title.hidden = list.hidden = branches.length < 2;
    fill(branches.map((branch, number) => {
      const at = make("b", {}, visible(branch.at).replace(/^·/, ""));
      const button = make("button", { type: "button", "aria-pressed": String(branch.current), class: `np-branch np-branch${number % 4}` });
      const sure = branch.mean === null ? "" : `, ${percent(branch.mean)} per token`;
      const before = make("span", { class: "np-told" }, `…${branch.before} `);
      button.append(make("span", {}, before, at, branch.after, make("span", { class: "np-note" }, ` (${branch.tokens} tokens${sure})`)));
      button.addEventListener("click", () => ask("branch", { branch: number }));
      return make("li", {}, button);
    }));
  };
  model.on("change:branches", update);
  update();
  return make("div", {}, title, list);
}

function download(text) {
  const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: "application/json" })), download: "playground.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

async function copy(text, root) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = make("textarea", {});
    field.value = text;
    root.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
}

function render({ model, el }) {
  views += 1;
  const id = `np${views}-${Math.random().toString(36).slice(2, 8)}`;
  const root = make("div", { class: "np", role: "region", "aria-label": "Prompt playground" });
  const silence = make("p", { class: "np-warning", hidden: true }, "The kernel has not answered yet: it is busy with another cell, or gone. If it was restarted, run this cell again.");
  const post = messenger(model, root, (silent) => (silence.hidden = !silent));
  const ask = (action, more) => post.send(action, more);
  const write = () => {
    text.follow("page");
    ask("generate", { prompt: prompt.field.value, settings: settings.values() });
  };
  const goOn = () => {
    text.follow("page");
    ask("continue", { settings: settings.values() });
  };
  const say = (said) => {
    text.follow("page");
    ask("send", { text: said, settings: settings.values() });
  };
  const take = (action, more) => {
    text.follow("list");
    ask(action, { ...more, settings: settings.values() });
  };
  const prompt = promptPart(model, id, post, write);
  const settings = settingsPart(model, id, post);
  const button = (label, action, kind = "") => make("button", { type: "button", class: kind, onclick: action }, label);
  const stop = button("Stop", () => ask("stop"), "np-stop");
  const generate = button("Generate", write, "np-main");
  const go = button("Continue", goOn);
  const buttons = make("div", { class: "np-row np-buttons" }, generate, stop, go, button("Clear", () => ask("clear")), settings.row);
  const text = textPart(model, id, post, ask);
  const turns = model.get("facts").chat ? sayPart(model, id, post, say) : null;
  const all = () => text.rows().map((row) => row[1]).join("");
  const said = make("span", { class: "np-note", role: "status" });
  const copied = button("Copy text", async () => {
    await copy(all(), root);
    said.textContent = "copied";
    setTimeout(() => (said.textContent = ""), 2000);
  }, "np-small");
  const saved = button("Save", () => ask("save"), "np-small");
  const status = make("span", { class: "np-status" });
  const error = make("p", { class: "np-error", role: "alert" });
  const spoken = make("p", { class: "np-hidden", "aria-live": "polite" });
  const speed = make("p", { class: "np-speed np-note" });
  let before = "idle";
  const marks = () => {
    const { phase = "idle", status: message = "", error: wrong = "" } = model.get("marks");
    status.textContent = message;
    root.dataset.phase = phase;
    error.textContent = wrong;
    error.hidden = wrong === "";
    stop.setAttribute("aria-disabled", String(phase === "idle"));
    const busy = phase === "reading" || phase === "writing";
    generate.setAttribute("aria-disabled", String(busy));
    go.setAttribute("aria-disabled", String(busy));
    turns?.button.setAttribute("aria-disabled", String(busy));
    if (phase !== before) {
      if (phase === "writing") spoken.textContent = "Writing.";
      if (phase === "idle") spoken.textContent = `${message} ${all().slice(-400)}`;
      before = phase;
    }
  };
  const figures = () => {
    speed.textContent = `${model.get("facts").model} · ${model.get("speed")}`;
    speed.hidden = model.get("speed") === ""; // nothing has run
  };
  model.on("change:marks", marks);
  model.on("change:speed", figures);
  model.on("msg:custom", (message) => message?.file && download(message.file));
  const views3 = tabs(id, [
    ["Next token", nextPart(model, take)],
    ["Attention", attentionPart(model, id, post, text)],
    ["Lens", lensPart(model)],
    ["Cost", costPart(model)],
  ], (index) => started && ask("watch", { view: ["", "attention", "lens", ""][index] }));
  let started = false;
  views3.select(0);
  started = true;
  const textTop = make("div", { class: "np-row np-spread" }, heading(`${id}-text`, "Text"), make("span", { class: "np-row" }, said, copied, saved));
  const left = make("div", { class: "np-left" }, prompt.node, buttons, settings.drawn, make("div", { class: "np-row" }, status), silence, error, textTop, ...text.node, ...(turns ? [turns.node] : []));
  const right = make("div", { class: "np-right" }, ...views3.node);
  root.append(make("div", { class: "np-columns" }, left, right), branchesPart(model, id, ask), speed, spoken);
  root.addEventListener("keydown", (event) => event.key === "Escape" && ask("stop"));
  // Ctrl or Cmd with S, and with other letters that edit no text, are the notebook's: for them the mark is taken off.
  const letThrough = (event) => {
    const node = event.target;
    if (!(event.ctrlKey || event.metaKey) || event.altKey || !/^[bd-uw]$/i.test(event.key)) return;
    if (!root.contains(node) || !node.dataset.lmSuppressShortcuts) return;
    delete node.dataset.lmSuppressShortcuts;
    setTimeout(() => (node.dataset.lmSuppressShortcuts = "true"));
  };
  window.addEventListener("keydown", letThrough, true); // before Lab, which listens on the document
  marks();
  figures();
  keepForReload(model, root, ask);
  el.append(root);
  return () => window.removeEventListener("keydown", letThrough, true);
}

export default { render };
