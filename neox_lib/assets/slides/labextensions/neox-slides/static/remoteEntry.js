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
 *
 * The form is that of webpack's module federation: init() is called with the page's shared modules before any
 * extension is started, get() gives the extension itself.
 */
const plugin = {
  id: "neox-slides:plugin",
  autoStart: true,
  activate(app) {
    if (app.name !== "Rise") return;
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
    const consoles = { IConsoleTracker: { name: "@jupyterlab/console:IConsoleTracker" } };
    shared["@jupyterlab/console"] ??= { "4.3.4": { get: async () => () => consoles, from: "neox-slides", loaded: 1 } };
  },
  async get() {
    return () => ({ __esModule: true, default: plugin });
  },
};
