// PrefGen in the browser: the sidebar, the grid in Load Preference History, Like and Dislike on any picture.
import { app } from "../../scripts/app.js";
import { dressFuseNode } from "./nodes/fuse.js";
import { dressTextNode } from "./nodes/text.js";
import { menuItems, rateNodes, selectedNodes } from "./taste/anywhere.js";
import { showFaults } from "./taste/faults.js";
import { dressHistoryNode } from "./taste/node.js";
import { renderPanel } from "./taste/panel.js";
import { openRateView } from "./taste/rate.js";
import { SOCKETS, addStyle } from "./taste/style.js";
import { listen, tastes } from "./taste/tastes.js";
import { t } from "./taste/texts.js";

let closePanel = null;

app.registerExtension({
  name: "PrefGen.Taste",
  commands: [
    { id: "PrefGen.Like", label: t("Like the picture"), icon: "pi pi-thumbs-up", function: () => rateNodes(selectedNodes(), "liked") },
    { id: "PrefGen.Dislike", label: t("Dislike the picture"), icon: "pi pi-thumbs-down", function: () => rateNodes(selectedNodes(), "disliked") },
    { id: "PrefGen.Rate", label: t("Rate pictures"), icon: "pi pi-clone", function: openRateView },
  ],
  keybindings: [
    { commandId: "PrefGen.Like", combo: { key: "l", alt: true } },
    { commandId: "PrefGen.Dislike", combo: { key: "d", alt: true } },
  ],
  getNodeMenuItems: menuItems,

  setup() {
    addStyle();
    showFaults();
    app.extensionManager?.registerSidebarTab?.({
      id: "prefgen-taste",
      icon: "pi pi-heart",
      title: t("Taste"),
      tooltip: t("Taste"),
      type: "custom",
      render: (element) => {
        closePanel?.();
        closePanel = renderPanel(element);
      },
      destroy: () => closePanel?.(),
    });
    // A new taste can be chosen in every node at once. Asked only then: it reads all node definitions and says so.
    let offered = null;
    listen(() => {
      const choices = tastes.all.filter((taste) => taste.liked).map((taste) => taste.name).join("\n");
      if (offered !== null && offered !== choices) app.refreshComboInNodes?.();
      offered = choices;
    });
  },

  beforeRegisterNodeDef(nodeType) {
    // Front ends before getNodeMenuItems ask the node itself.
    const before = nodeType.prototype.getExtraMenuOptions;
    nodeType.prototype.getExtraMenuOptions = function (canvas, options, ...rest) {
      const result = before?.call(this, canvas, options, ...rest);
      const labels = new Set((options ?? []).map((option) => option?.content));
      for (const item of menuItems(this)) if (!labels.has(item.content)) options?.push(item);
      return result;
    };
  },

  nodeCreated(node) {
    dressHistoryNode(node);
    dressFuseNode(node);
    dressTextNode(node);
  },

  afterConfigureGraph() {
    // Setting them in setup() doesn't hold: the front end writes its own colours when a graph is loaded.
    for (const table of [app.canvas?.default_connection_color_byType, window.LGraphCanvas?.link_type_colors]) {
      if (table) Object.assign(table, SOCKETS);
    }
  },
});
