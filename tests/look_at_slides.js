// Goes through all slides of a show; gives their number and what is wrong with each. Sizes are those on the screen.
async ([smallest, prediction]) => {
    const frame = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
    const box = (element) => element.getBoundingClientRect();
    const PARTS = "pre, img, table, p, .cm-scroller, .jp-OutputArea-output";
    const NO_TEXT = "style, .np-still, mjx-container";
    const found = new Set();
    const buttons = [...document.querySelectorAll(".reveal > .controls, .reveal > .slide-number, #help-b")];

    function lookAt(slide, say) {
        const shown = [...slide.querySelectorAll(".jp-Cell:not(.reveal-skip)")];
        const scale = box(slide).height / slide.offsetHeight;
        if (!shown.some((cell) => box(cell).height > 15)) say("is empty");
        if (box(slide).bottom > innerHeight + 1 || box(slide).right > innerWidth + 1) say("is larger than the screen");
        const excess = slide.scrollHeight - slide.clientHeight;
        if (excess > 1) say(`is ${excess} pixels too high`);
        for (const part of shown.flatMap((cell) => [cell, ...cell.querySelectorAll(PARTS)])) {
            const { left, right, bottom, height } = box(part);
            const name = part.className || part.tagName;
            if (!height) continue;
            const inside = part.clientWidth && part.scrollWidth > part.clientWidth + 1;
            if (left < 0 || right > innerWidth || inside) say(`${name} is cut off at the right`);
            for (const button of buttons.map(box))
                if (button.height && bottom > button.top && right > button.left && left < button.right)
                    say(`${name} lies under the buttons`);
            if (part.tagName === "IMG" && box(part).width < 0.6 * part.naturalWidth) say("its figure is too small");
        }
        const said = slide.innerText;
        for (const { alt } of slide.querySelectorAll("img"))
            if (alt && said.includes(alt.slice(0, 20))) say(`an alt text is on the wall: ${alt.slice(0, 20)}`);
        for (const line of slide.querySelectorAll(".cm-line"))
            if (/\bassert/.test(line.textContent) && line.checkVisibility())
                say(`an assert is on the wall: ${line.textContent.trim()}`);
        const texts = document.createTreeWalker(slide, NodeFilter.SHOW_TEXT);
        for (let text = texts.nextNode(); text; text = texts.nextNode()) {
            const around = text.parentElement;
            const least = around.closest(".widget-vbox:has(.widget-radio)") ? prediction : smallest;
            const size = parseFloat(getComputedStyle(around).fontSize) * scale;
            if (text.data.trim() && around.checkVisibility() && !around.closest(NO_TEXT) && size < least)
                say(`${size} pixels are too small to read: ${text.data.trim().slice(0, 30)}`);
        }
    }

    const stacks = [...document.querySelectorAll(".slides > section")];
    for (const [column, stack] of stacks.entries())
        for (const [row, slide] of [...stack.querySelectorAll(":scope > section")].entries()) {
            location.hash = `#/${column}/${row}`;
            for (let tries = 0; tries < 50 && !(slide.classList.contains("present") && box(slide).height); tries++)
                await frame();
            await frame();
            lookAt(slide, (finding) => found.add(`slide ${column}/${row}: ${finding}`));
        }
    return { slides: document.querySelectorAll(".slides > section > section").length, found: [...found] };
}
