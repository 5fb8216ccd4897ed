// Draws a result: the photo under the colours of its classes, their list, and the files. Gradio runs this file once, as
// the body of a function of `element`, `props` and `watch`. `props.value` is what `show` in page.py returns.
const OPACITY = 0.55;
const HIGHLIGHT = 0.85; // the opacity of the class under the pointer
const DIMMED = 0.75; // the factor of the others' opacity
const LABELS = { "labels.png": "Label map (PNG)", "overlay.jpg": "Overlay (JPEG)", "parsing.jpg": "Panels (JPEG)",
  "parsing.json": "Report (JSON)", "objects.png": "Objects (PNG)", "parts.png": "Parts (PNG)",
  "materials.png": "Materials (PNG)", "textures.png": "Textures (PNG)" };
let opacity = OPACITY; // kept from photo to photo
let run = 0;

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

async function picture(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error("this result is no longer there: run the photo again");
  // Numbers in a picture must not be changed by a conversion of colours.
  return createImageBitmap(await answer.blob(), { colorSpaceConversion: "none", premultiplyAlpha: "none" });
}

function numbersOf(bitmap) {
  const canvas = make("canvas", { width: bitmap.width, height: bitmap.height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, bitmap.width, bitmap.height);
  const numbers = new Uint16Array(bitmap.width * bitmap.height);
  for (let i = 0; i < numbers.length; i++) numbers[i] = data[4 * i] + 256 * data[4 * i + 1];
  return numbers;
}

function layerView(photo, numbers, classes, caption) {
  const { width, height } = photo;
  const canvas = make("canvas", { width, height, role: "img", "aria-label": "the photo under the colours of its classes" });
  const context = canvas.getContext("2d");
  const layer = make("canvas", { width, height }).getContext("2d");
  const pixels = layer.createImageData(width, height);
  const words = new Uint32Array(pixels.data.buffer); // little-endian on all browsers' machines: alpha, blue, green, red
  const colours = classes.map(({ colour }) => parseInt(colour.slice(1), 16));
  const shown = classes.map(() => true);
  const hover = make("div", { class: "hover", hidden: true });
  let active = -1;

  function draw() {
    const table = colours.map((colour, place) => {
      let alpha = shown[place] ? opacity : 0;
      if (active >= 0 && shown[active]) alpha = place === active ? Math.max(alpha, HIGHLIGHT) : alpha * DIMMED;
      const [red, green, blue] = [colour >> 16, (colour >> 8) & 255, colour & 255];
      return ((Math.round(alpha * 255) << 24) | (blue << 16) | (green << 8) | red) >>> 0;
    });
    for (let i = 0; i < words.length; i++) words[i] = table[numbers[i]];
    layer.putImageData(pixels, 0, 0);
    context.drawImage(photo, 0, 0);
    context.drawImage(layer.canvas, 0, 0);
  }

  const items = classes.map(({ name, share, colour }, place) => {
    const box = make("input", { type: "checkbox", checked: true, onchange: () => toggle(place, box.checked) });
    const swatch = make("span", { class: "swatch", style: `background: ${colour}` });
    const label = make("label", {}, box, swatch, make("span", { class: "name" }, name), make("span", { class: "share" }, share));
    return make("li", { onpointerenter: () => point(place), onpointerleave: () => point(-1) }, label);
  });

  function toggle(place, value) {
    shown[place] = value;
    items[place].classList.toggle("off", !value);
    items[place].querySelector("input").checked = value;
    draw();
  }

  function toggleAll(value) {
    classes.forEach((_, place) => { shown[place] = value; });
    items.forEach((_, place) => toggle(place, value));
  }

  function point(place) {
    if (place === active) return;
    items[active]?.classList.remove("active");
    items[place]?.classList.add("active");
    active = place;
    draw();
  }

  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const column = Math.min(width - 1, Math.max(0, Math.floor((x / box.width) * width)));
    const row = Math.min(height - 1, Math.max(0, Math.floor((y / box.height) * height)));
    const place = numbers[row * width + column];
    point(place);
    hover.textContent = `${classes[place].name} ${classes[place].share}`;
    hover.hidden = false;
    hover.style.left = `${Math.max(0, Math.min(x + 14, box.width - hover.offsetWidth))}px`;
    hover.style.top = `${Math.max(0, y > hover.offsetHeight + 14 ? y - hover.offsetHeight - 10 : y + 22)}px`;
  });
  canvas.addEventListener("pointerleave", () => { hover.hidden = true; point(-1); });

  const slider = make("input", {
    type: "range", min: 0, max: 100, value: Math.round(opacity * 100), "aria-label": "opacity of the colours",
    oninput: () => { opacity = slider.value / 100; draw(); },
  });
  const tools = make("div", { class: "tools" }, make("label", { class: "opacity" }, "Opacity", slider),
    make("button", { type: "button", onclick: () => toggleAll(true) }, "Show all"),
    make("button", { type: "button", onclick: () => toggleAll(false) }, "Hide all"));
  draw();
  return make("div", { class: "columns" },
    make("figure", {}, canvas, hover, make("figcaption", {}, caption)),
    make("div", { class: "side" }, tools, make("ul", { class: "classes" }, ...items)));
}

function downloads(files) {
  const links = Object.entries(files).map(([ending, address]) => {
    const name = decodeURIComponent(address.split("/").pop());
    return make("a", { class: "download", href: address, download: name, "data-file": ending }, LABELS[ending] ?? name);
  });
  return make("div", { class: "downloads" }, ...links);
}

async function resultView(value) {
  const [photo, ...maps] = await Promise.all([value.picture, ...value.layers.map((layer) => layer.picture)].map(picture));
  const views = value.layers.map((layer, index) =>
    [layer.title, () => layerView(photo, numbersOf(maps[index]), layer.classes, value.caption)]);
  const panels = value.files["parsing.jpg"];
  if (panels) views.unshift(["All panels", () => make("img", { class: "panels", src: panels, alt: "a panel for each task" })]);
  const place = make("div");
  const tabs = views.map(([title, view]) => make("button", {
    type: "button", role: "tab", "aria-selected": "false",
    onclick: (event) => {
      tabs.forEach((tab) => tab.setAttribute("aria-selected", String(tab === event.target)));
      place.replaceChildren(view());
    },
  }, title));
  tabs[0]?.click();
  return [
    ...(value.scene.length ? [make("p", { class: "scene" }, make("strong", {}, "Scene: "), value.scene.join(", "))] : []),
    ...(tabs.length > 1 ? [make("div", { class: "tabs", role: "tablist" }, ...tabs)] : []),
    place, downloads(value.files),
  ];
}

async function render() {
  const mine = ++run;
  const value = props.value ? JSON.parse(JSON.stringify(props.value)) : null;
  let nodes;
  if (!value) nodes = [make("div", { class: "empty" }, "Drop a photo on the left, take one, or choose an example.")];
  else if (value.error) nodes = [make("div", { class: "error", role: "alert" }, value.error)];
  else {
    try {
      nodes = await resultView(value);
    } catch (error) {
      nodes = [make("div", { class: "error", role: "alert" }, error.message)];
    }
  }
  if (mine === run) element.querySelector(".viewer").replaceChildren(...nodes);
}

watch("value", render);
render();
