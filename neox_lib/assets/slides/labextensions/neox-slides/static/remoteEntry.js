/*
 * For notebooks shown as slides, in the page of JupyterLab's RISE extension. Anywhere else this does nothing.
 *
 * 1. Widgets. Their extension (jupyterlab_widgets 3.0.17) asks for the shared module @jupyterlab/console and is not
 *    loaded where there is none. JupyterLab has it, RISE 0.43's page has not, so that no widget shows on a slide. All
 *    that the widgets take from it is the token of an optional service. Here is one that nobody provides: without
 *    consoles, nothing is missing.
 * 2. Ctrl+Enter runs the selected cell, which is the first with code on the slide, wherever the focus is.
 * 3. Alt+A runs the whole notebook, the cells that are not shown too, and stays on the slide. (JupyterLab's own
 *    command, Run All Cells, goes to the last cell, and the show with it.)
 * 4. Asserts and alt texts are not on the wall. Only what is typed on the slide itself shows them.
 *
 * The form is that of webpack's module federation: init() is called with the page's shared modules before any
 * extension is started, get() gives the extension itself.
 */
let module; // (name) => what the page shares under that name

async function withoutAsides() {
  const { EditorView, Decoration } = await module("@codemirror/view");
  const { StateField } = await module("@codemirror/state");
  const { syntaxTree } = await module("@codemirror/language");

  // lines that a statement or an argument has for itself; a loop that holds nothing but asserts is one
  function lines(state, tree) {
    const hidden = [];
    const textOf = (node) => state.sliceDoc(node.from, node.to);
    const isAssert = (node) => node.name === "AssertStatement" || /^[\w.]*\bassert_/.test(textOf(node));
    const onlyAsserts = (body) => body && body.getChildren("Statement").every(isAside);
    const isAside = (node) =>
      /^(For|With)Statement$/.test(node.name)
        ? onlyAsserts(node.getChild("Body"))
        : isAssert(node) || (node.name === "AssignStatement" && /^alt\b/.test(textOf(node)));
    const hide = (from, to) => {
      const first = state.doc.lineAt(from);
      const last = from + state.sliceDoc(from, to).trimEnd().length; // a loop's node ends where the next line begins
      if (!state.sliceDoc(first.from, from).trim())
        hidden.push(Decoration.replace({ block: true }).range(first.from, state.doc.lineAt(last).to));
      return false;
    };
    tree.iterate({
      enter({ node }) {
        if (node.type.is("Statement") && isAside(node)) return hide(node.from, node.to);
        if (node.name === "AssignOp" && node.parent.name === "ArgList" && textOf(node.prevSibling) === "alt")
          return hide(node.prevSibling.from, node.nextSibling.to);
      },
    });
    return Decoration.set(hidden, true);
  }
  const look = (state) => {
    const tree = syntaxTree(state);
    const done = tree.type.name === "Script" && tree.length === state.doc.length;
    return { done, hidden: done ? lines(state, tree) : Decoration.none };
  };
  return StateField.define({
    create: look,
    update: (was, change) => (was.done ? { done: true, hidden: was.hidden.map(change.changes) } : look(change.state)),
    provide: (field) => EditorView.decorations.from(field, (value) => value.hidden),
  });
}

const plugin = {
  id: "neox-slides:plugin",
  autoStart: true,
  async activate(app, editors) {
    if (app.name !== "Rise") return;
    const { EditorExtensionRegistry } = await module("@jupyterlab/codemirror");
    const asides = EditorExtensionRegistry.createImmutableExtension(await withoutAsides());
    editors.addExtension({ name: "neox-slides:asides", factory: () => asides });
    // whoever presses a key while the kernel still starts means it all the same, and wants no dialog about kernels
    const add = (id, label, keys, run) => {
      const execute = async () => {
        await app.shell.currentWidget.sessionContext.ready;
        await run(app.shell.currentWidget.content);
      };
      app.commands.addCommand(id, { label, execute });
      app.commands.addKeyBinding({ command: id, keys: [keys], selector: "body" });
    };
    add("neox-slides:run", "Run the Code on This Slide", "Accel Enter", () => app.commands.execute("notebook:run-cell"));
    add("neox-slides:run-all", "Run the Whole Notebook and Stay on This Slide", "Alt A", async (notebook) => {
      const here = notebook.activeCellIndex;
      const done = app.commands.execute("notebook:run-all-cells");
      notebook.activeCellIndex = here;
      await done;
    });
  },
};

(window._JUPYTERLAB = window._JUPYTERLAB || {})["neox-slides"] = {
  init(shared) {
    module = async (name) => (await Object.values(shared[name])[0].get())();
    const consoles = { IConsoleTracker: { name: "@jupyterlab/console:IConsoleTracker" } };
    shared["@jupyterlab/console"] ??= { "4.3.4": { get: async () => () => consoles, from: "neox-slides", loaded: 1 } };
  },
  async get() {
    plugin.requires = [(await module("@jupyterlab/codemirror")).IEditorExtensionRegistry];
    return () => ({ __esModule: true, default: plugin });
  },
};
