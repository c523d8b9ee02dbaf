// One style sheet, in ComfyUI's own colours: readable in light and dark.
const STYLE = `
.prefgen-panel { display: flex; flex-direction: column; gap: .5rem; height: 100%; padding: .5rem; box-sizing: border-box; color: var(--fg-color); }
.prefgen-panel:focus { outline: none; }
.prefgen-panel header, .prefgen-panel footer, .prefgen-rate header, .prefgen-rate footer { display: flex; align-items: center; gap: .25rem; }
.prefgen-panel select { flex: 1; min-width: 0; padding: .3rem; color: var(--input-text); background: var(--comfy-input-bg); border: 1px solid var(--border-color); border-radius: 4px; }
.prefgen-button { display: inline-flex; align-items: center; justify-content: center; min-width: 2rem; height: 2rem; padding: 0 .4rem; color: var(--input-text); background: var(--comfy-input-bg); border: 1px solid var(--border-color); border-radius: 4px; cursor: pointer; list-style: none; }
.prefgen-button:disabled { opacity: .4; cursor: default; }
.prefgen-button:focus-visible, .prefgen-grid figure:focus-visible, .prefgen-panel [role=tab]:focus-visible { outline: 2px solid var(--p-primary-color, #4a90d9); outline-offset: 1px; }
.prefgen-menu { position: relative; }
.prefgen-menu > div { position: absolute; right: 0; z-index: 10; display: flex; flex-direction: column; min-width: 16rem; background: var(--comfy-menu-bg); border: 1px solid var(--border-color); border-radius: 4px; }
.prefgen-menu [role=menuitem] { padding: .45rem .7rem; text-align: left; color: var(--fg-color); background: none; border: 0; cursor: pointer; }
.prefgen-menu [role=menuitem]:hover, .prefgen-menu [role=menuitem]:focus { background: var(--comfy-input-bg); }
.prefgen-meter { height: 6px; background: var(--comfy-input-bg); border-radius: 3px; overflow: hidden; }
.prefgen-meter > div { height: 100%; background: var(--p-primary-color, #4a90d9); }
.prefgen-note { margin: .25rem 0 0; font-size: .8rem; color: var(--descrip-text); overflow: hidden; text-overflow: ellipsis; }
.prefgen-panel nav { display: flex; flex-wrap: wrap; }
.prefgen-panel [role=tab] { flex: auto; padding: .35rem .2rem; font-size: .82rem; white-space: nowrap; color: var(--fg-color); background: none; border: 0; border-bottom: 2px solid var(--border-color); cursor: pointer; }
.prefgen-panel [role=tab][aria-selected=true] { border-bottom-color: var(--p-primary-color, #4a90d9); }
.prefgen-grid { flex: 1; min-height: 0; overflow-y: auto; display: grid; grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); gap: 4px; align-content: start; }
.prefgen-grid figure { position: relative; margin: 0; aspect-ratio: 1; border-radius: 4px; overflow: hidden; background: var(--comfy-input-bg); cursor: pointer; border: 2px solid transparent; }
.prefgen-grid figure[data-verdict=liked] { border-color: #3fa45b; }
.prefgen-grid figure[data-verdict=disliked] { border-color: #c5483f; }
.prefgen-grid figure[aria-selected=true] { box-shadow: inset 0 0 0 3px var(--p-primary-color, #4a90d9); opacity: .8; }
.prefgen-grid img { width: 100%; height: 100%; object-fit: cover; display: block; }
.prefgen-verdicts { position: absolute; inset: auto 2px 2px 2px; display: none; justify-content: center; gap: 2px; }
.prefgen-grid figure:hover .prefgen-verdicts, .prefgen-grid figure:focus-within .prefgen-verdicts { display: flex; }
.prefgen-verdicts .prefgen-button { min-width: 1.6rem; height: 1.6rem; padding: 0; }
.prefgen-verdicts [aria-pressed=true] { background: var(--p-primary-color, #4a90d9); }
.prefgen-text { height: 100%; box-sizing: border-box; padding: 4px 6px; overflow: auto; white-space: pre-wrap; user-select: text; color: var(--input-text); background: var(--comfy-input-bg); border-radius: 4px; font-size: 11px; }
.prefgen-node { display: flex; gap: 4px; height: 100%; position: relative; color: var(--input-text); font-size: 11px; }
.prefgen-node.prefgen-over .prefgen-half { outline: 2px dashed var(--p-primary-color, #4a90d9); outline-offset: -2px; }
.prefgen-half { flex: 1; min-width: 0; display: flex; flex-direction: column; background: var(--comfy-input-bg); border-radius: 4px; padding: 4px; }
.prefgen-half > div { flex: 1; min-height: 0; overflow-y: auto; display: grid; grid-template-columns: repeat(auto-fill, minmax(34px, 1fr)); gap: 2px; align-content: start; }
.prefgen-half img { width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 2px; }
.prefgen-half[data-verdict=liked] { border-top: 2px solid #3fa45b; }
.prefgen-half[data-verdict=disliked] { border-top: 2px solid #c5483f; }
.prefgen-node > .prefgen-button { position: absolute; right: 0; top: 0; height: 1.4rem; min-width: 1.4rem; }
.prefgen-rate { position: fixed; inset: 0; z-index: 9000; display: flex; flex-direction: column; padding: .75rem; gap: .5rem; background: var(--comfy-menu-bg); color: var(--fg-color); }
.prefgen-rate:focus { outline: none; }
.prefgen-rate header > span { flex: 1; color: var(--descrip-text); }
.prefgen-rate footer { justify-content: center; gap: .75rem; color: var(--descrip-text); }
.prefgen-stage { flex: 1; min-height: 0; display: flex; gap: 1rem; align-items: center; justify-content: center; overflow: auto; }
.prefgen-stage img { max-width: 100%; max-height: 100%; object-fit: contain; image-rendering: auto; cursor: zoom-in; }
.prefgen-stage img:only-child { height: 100%; }
.prefgen-stage img + img, .prefgen-stage img:has(+ img) { width: calc(50% - .5rem); height: 100%; }
.prefgen-nine { display: grid; grid-template: repeat(3, minmax(0, 1fr)) / repeat(3, minmax(0, 1fr)); gap: 6px; overflow: hidden; }
.prefgen-cell { position: relative; width: 100%; height: 100%; min-height: 0; display: flex; align-items: center; justify-content: center; border: 2px solid transparent; border-radius: 4px; box-sizing: border-box; }
.prefgen-cell[aria-current=true] { border-color: var(--p-primary-color, #4a90d9); }
.prefgen-cell img, .prefgen-cell img:only-child { width: auto; height: 100%; max-width: 100%; object-fit: contain; }
.prefgen-cell:hover .prefgen-verdicts, .prefgen-cell[aria-current=true] .prefgen-verdicts { display: flex; }
.prefgen-zoomed .prefgen-cell { height: auto; }
.prefgen-rate header > strong { flex: none; }
.prefgen-words { flex: 1; min-height: 0; overflow-y: auto; display: flex; flex-direction: column; gap: .75rem; }
.prefgen-words h3 { margin: 0 0 .3rem; font-size: .85rem; font-weight: 600; }
.prefgen-words ul { display: flex; flex-wrap: wrap; gap: .3rem; margin: 0 0 .4rem; padding: 0; list-style: none; }
.prefgen-words input { width: 100%; box-sizing: border-box; padding: .3rem; color: var(--input-text); background: var(--comfy-input-bg); border: 1px solid var(--border-color); border-radius: 4px; }
.prefgen-chip { display: inline-flex; align-items: center; gap: .3rem; padding: 0 .1rem 0 .55rem; font-size: .85rem; color: var(--input-text); background: var(--comfy-input-bg); border: 1px solid var(--border-color); border-radius: 1rem; }
.prefgen-chip small { color: var(--descrip-text); }
.prefgen-chip[data-state=struck] span { text-decoration: line-through; opacity: .6; }
.prefgen-chip[data-state=added] { border-color: var(--p-primary-color, #4a90d9); }
.prefgen-chip .prefgen-button { min-width: 1.5rem; height: 1.5rem; padding: 0; border: 0; background: none; }
.prefgen-dialog { width: min(40rem, 92vw); max-height: 85vh; padding: 1rem; color: var(--fg-color); background: var(--comfy-menu-bg); border: 1px solid var(--border-color); border-radius: 8px; }
.prefgen-dialog::backdrop { background: #0008; }
.prefgen-dialog header { display: flex; align-items: center; justify-content: space-between; margin-bottom: .5rem; }
.prefgen-dialog h2 { margin: 0; font-size: 1.1rem; }
.prefgen-dialog label { display: flex; justify-content: space-between; align-items: center; gap: 1rem; margin: .5rem 0; }
.prefgen-dialog select { min-width: 12rem; padding: .3rem; color: var(--input-text); background: var(--comfy-input-bg); border: 1px solid var(--border-color); border-radius: 4px; }
.prefgen-models { display: flex; flex-direction: column; gap: .5rem; margin-top: .75rem; }
.prefgen-models article { display: flex; align-items: center; justify-content: space-between; gap: 1rem; padding-bottom: .5rem; border-bottom: 1px solid var(--border-color); }
.prefgen-models article > div { display: flex; flex-direction: column; min-width: 0; flex: 1; }
.prefgen-models .prefgen-button, .prefgen-models article > span { flex: none; white-space: nowrap; }
.prefgen-models progress { width: 100%; margin-top: .3rem; accent-color: var(--p-primary-color, #4a90d9); }
.prefgen-fault { position: fixed; left: 50%; bottom: 4.5rem; transform: translateX(-50%); z-index: 9500; display: flex; align-items: center; gap: .75rem; max-width: min(46rem, 90vw); padding: .75rem 1rem; color: var(--fg-color); background: var(--comfy-menu-bg); border: 1px solid #c5483f; border-left-width: 5px; border-radius: 6px; box-shadow: 0 4px 18px #0006; }
.prefgen-fault > i { color: #c5483f; font-size: 1.3rem; }
.prefgen-fault p { margin: .2rem 0 0; }
.prefgen-fault .prefgen-button { flex: none; white-space: nowrap; }
.prefgen-zoomed { align-items: flex-start; }
.prefgen-zoomed img { max-width: none; max-height: none; height: auto; cursor: zoom-out; }
:root { --color-datatype-PREFGEN_MLLM: #b48ead; --color-datatype-PREFGEN_PREFERENCE: #d08770; --color-datatype-PREFGEN_USER: #ebcb8b; }
`;

export const SOCKETS = { PREFGEN_MLLM: "#b48ead", PREFGEN_PREFERENCE: "#d08770", PREFGEN_USER: "#ebcb8b" };

export function addStyle() {
  const sheet = document.createElement("style");
  sheet.textContent = STYLE;
  document.head.append(sheet);
}
